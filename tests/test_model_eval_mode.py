"""Modes while generating: dropout is off in every thread, and every module gets its own mode back."""

from __future__ import annotations

import threading

import pytest
import torch
from model_cases import random_model

from posttrain import adapters
from posttrain.adapters import LoraConfig
from posttrain.model import generate
from posttrain.model.eval_mode import eval_mode
from posttrain.speculative import engine
from posttrain.speculative.ngram import NgramDrafter

RUNS = (generate, lambda *args, **options: engine.generate(*args, NgramDrafter(), **options)[0])


def make_model():
    """One whose text dropout changes."""
    torch.manual_seed(5)
    model = random_model()
    adapters.attach(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False))
    return model


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("training", (True, False))
def test_every_module_gets_its_own_mode_back(run, training):
    model = make_model()
    expected = generate(model.eval(), [[1, 2, 3]], 10)
    model.train(training)
    model.model.layers[0].train(not training)
    modes = [module.training for module in model.modules()]
    assert run(model, [[1, 2, 3]], 10) == expected
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        run(model, [[1, 2, 3]], 10, on_token=lambda *_: 1 // 0)
    assert [module.training for module in model.modules()] == modes
    assert "_generating" not in model.__dict__


@pytest.mark.parametrize("run", RUNS)
def test_a_thread_that_ends_first_leaves_the_others_in_eval_mode(run):
    model, results, started, ended = make_model(), [], threading.Event(), threading.Event()
    expected = generate(model.eval(), [[1, 2, 3]], 20)
    model.train()

    def wait(row, token):
        started.set()
        ended.wait()

    def first(row, token):
        thread.start()
        started.wait()

    thread = threading.Thread(target=lambda: results.append(run(model, [[1, 2, 3]], 20, on_token=wait)), daemon=True)
    run(model, [[5]], 1, on_token=first)
    assert not model.training
    ended.set()
    thread.join()
    assert results == [expected] and all(module.training for module in model.modules())


def test_a_model_set_to_train_between_is_in_eval_mode_for_the_next():
    model = make_model().eval()
    with eval_mode(model):
        model.train()
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
        assert not model.training
    assert model.training
