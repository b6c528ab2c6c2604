"""Prompts of four kinds, written for this benchmark and under the project's licence. CHAT ones go through the chat template."""

_LETTER = """\
Dear members, the library will close for repairs from the third of March until the end of May. During these weeks the
reading room on Mill Street stays open on Tuesdays and Thursdays between ten and four. Books that are due while the
library is closed may be returned in June without a fee. If you have reserved a book, we will send it to the reading
room and write to you when it is there. The children's group meets in the school hall as long as the repairs last. We
thank you for your patience and hope to see you soon."""

_REPORT = """\
The river Aldern rose by two metres on the night of the ninth of October. The upper bridge was closed at midnight and
the lower bridge an hour later. About forty families left their houses on the east bank and slept in the gymnasium.
Nobody was hurt. The pumps at the paper mill ran until noon on the tenth of October, when the water had fallen by half
a metre. The upper bridge was opened again on the eleventh of October, and the lower bridge, whose railing had been
torn away, on the fourteenth of October."""

_LIST = """\
- two kilograms of flour
- a dozen eggs
- half a litre of cream
- three lemons
- a bag of almonds
- brown sugar
- a jar of apricot jam
- vanilla pods"""

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
        True,
        [
            f"Here is my shopping list:\n\n{_LIST}\n\nWrite the whole list again and add butter at the end.",
            f"{_REPORT}\n\nRepeat the text above.",
            f"Proofread this text. Give the whole corrected text and nothing else.\n\n{_LETTER}",
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
