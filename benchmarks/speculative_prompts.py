"""Prompts of four kinds, written for this benchmark and under the project's licence. CHAT ones go through the chat template."""

_LETTER = """\
Dear members, the library will close for repairs from the third of March until the end of May. During these weeks the reading room
on Mill Street stays open on Tuesdays and Thursdays between ten and four. Books that are due while the library is closed may be
returned in June without a fee. If you have reserved a book, we will send it to the reading room and write to you when it is there.
The children's group meets in the school hall as long as the repairs last. We thank you for your patience and hope to see you soon."""

_REPORT = """\
The river Aldern rose by two metres on the night of the ninth of October. The upper bridge was closed at midnight and the lower bridge
an hour later. About forty families left their houses on the east bank and slept in the gymnasium. Nobody was hurt. The pumps at the
paper mill ran until noon on the tenth of October, when the water had fallen by half a metre. The upper bridge was opened again on the
eleventh of October, and the lower bridge, whose railing had been torn away, on the fourteenth of October."""

_FUNCTION = '''\
def read_measurements(path, separator=",", skip_header=True):
    """Read measurements from a text file: a list of (name, value) pairs."""
    measurements = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number == 0 and skip_header:
                continue
            fields = line.strip().split(separator)
            if len(fields) != 2:
                raise ValueError(f"line {number} has {len(fields)} fields, expected 2")
            measurements.append((fields[0], float(fields[1])))
    return measurements
'''

_CLASS = """\
class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("the amount of a deposit must be positive")
        self.balance += amount

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("the amount of a withdrawal must be positive")
        if amount > self.balance:
            raise ValueError("there is not enough money in the account")
        self.balance -= amount
"""

# kind -> (whether they are chat messages, prompts)
PROMPTS: dict[str, tuple[bool, list[str]]] = {
    "copying": (
        False,
        [
            f"The letter as it was sent:\n\n{_LETTER}\n\nThe same letter, word for word, as it was read out at the meeting:\n\n",
            f"First draft of the report:\n\n{_REPORT}\n\nFinal version, with the name of the river spelled Alderne:\n\n",
            f"Report:\n\n{_REPORT}\n\nThe report's most important sentences, quoted:\n\n",
        ],
    ),
    "code": (
        True,
        [
            f"Rename the variable `measurements` to `pairs` in this function and give the whole function.\n\n{_FUNCTION}",
            f"Add a method `transfer(self, other, amount)` to this class and give the whole class.\n\n{_CLASS}",
            "Write a Python function that checks whether a word is a palindrome, and three tests of it.",
        ],
    ),
    "chat": (
        True,
        [
            "What should I pack for a week of walking in the mountains in September?",
            "Explain to a child why the sky is blue.",
            "I have an interview on Monday and I am nervous. What can I do over the weekend to prepare?",
        ],
    ),
    "free text": (
        False,
        [
            "The lighthouse keeper had not spoken to anyone since the supply boat came in",
            "In the early years of the railway, travellers from the city would often",
            "She opened the letter slowly, because she already knew what her brother had written, and",
        ],
    ),
}
