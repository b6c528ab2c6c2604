"""Which layers a configuration selects, beside PEFT's own answer, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from posttrain.adapters.lora_config import LoraConfig, matches

NAMES = [
    f"model.layers.{i}.{part}"
    for i in range(12)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.1.up_proj", "input_layernorm")
] + ["q_proj", "xq_proj", "lm_head", "model.embed_tokens"]
CONFIGS = [
    {"target_modules": ["q_proj"]},
    {
        "target_modules": ["q_proj", "down_proj"],
        "exclude_modules": ["model.layers.1.mlp.down_proj", "layers.2.self_attn.q_proj"],
    },
    {"target_modules": ["model.layers.3.self_attn.q_proj"]},
    {"target_modules": ["self_attn.v_proj"], "exclude_modules": r".*\.1.*"},
    {"target_modules": r".*layers\.(1|2)\..*_proj"},
    {"target_modules": r"layers\.1\.self_attn\.q_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": ["experts"]},
]


@pytest.mark.peers
@pytest.mark.parametrize("settings", CONFIGS)
def test_selects_what_peft_selects(settings):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(**settings)
    expected = [bool(found) and type(found).__name__ != "_ExcludedModule" for found in
                (check_target_module_exists(theirs, name) for name in NAMES)]  # fmt: skip
    assert [matches(LoraConfig(**settings), name) for name in NAMES] == expected
    assert any(expected) or settings["target_modules"].startswith("layers")  # the last: a regex must match from the start


@pytest.mark.peers
def test_patterns_are_looked_up_as_peft_does():
    other = pytest.importorskip("peft.utils.other")
    pattern = {"v_proj": 3, r"layers\.1\..*": 5, "model.layers.1.self_attn.q_proj": 7, "proj": 11}
    config = LoraConfig(r=2, rank_pattern=pattern)
    for name in NAMES:
        assert config.rank(name) == pattern.get(other.get_pattern_key(pattern, name), 2)


def test_all_linear_leaves_the_head_out():
    config = LoraConfig(target_modules="All-Linear")
    assert matches(config, "model.layers.0.mlp.up_proj") and not matches(config, "lm_head")


def test_scaling():
    config = LoraConfig(r=4, lora_alpha=12, rank_pattern={"v_proj": 9}, alpha_pattern={"down_proj": 2})
    assert [config.scaling(n) for n in ("q_proj", "v_proj", "mlp.down_proj")] == [12 / 4, 12 / 9, 2 / 4]
    assert LoraConfig(r=9, lora_alpha=12, use_rslora=True).scaling("q_proj") == 12 / math.sqrt(9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0; a rank is a whole number of at least 1"),
        ({"r": -1}, "r is -1"),
        ({"r": 2.0}, "r is 2.0"),
        ({"r": True}, "r is True"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a finite number other than 0"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"alpha_pattern": {"q": math.nan}}, r"alpha_pattern\['q'\] is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": float("nan")}, "lora_dropout is nan"),
        ({"bias": "some"}, "bias is 'some'; expected one of none, all, lora_only"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; expected list"),
        ({"init_lora_weights": "pissa_niter_0"}, "'pissa_niter_0'"),
        ({"init_lora_weights": "eva"}, "'eva'; expected True, False"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}}, r"rank_pattern\['q'\] = 3; .* even ranks"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias goes with"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias goes with"),
        ({"loftq_config": {"loftq_bits": 2}}, "loftq_bits 4"),
        ({"loftq_config": {"loftq_iter": 0}}, "loftq_iter of at least 1"),
        ({"loftq_config": {"bits": 4}}, "loftq_config has bits"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": 5}, r"target_modules is 5; expected str \| list\[str\]"),
        ({"exclude_modules": [5]}, r"exclude_modules is \[5\]; expected str"),
        ({"target_modules": "(q"}, r"target_modules is '\(q', which is no regular expression: missing \)"),
        ({"exclude_modules": "*"}, "exclude_modules is .* nothing to repeat"),
        ({"rank_pattern": {"(q": 4}}, r"rank_pattern .*'\(q', which is no regular expression"),
        ({"use_dora": "False"}, "use_dora is 'False'; expected bool"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; expected float"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'; expected float"),
        ({"rank_pattern": None}, r"rank_pattern is None; expected dict\[str, int\]"),
        ({"rank_pattern": {1: 2}}, r"rank_pattern is \{1: 2\}; expected dict"),
        ({"loftq_config": None}, r"loftq_config is None; expected dict"),
        ({"target_modules": "x", "layers_to_transform": 1}, "to be a list"),
        ({"target_modules": ["x"], "layers_pattern": "layers"}, "say which layers"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"layers_to_transform": range(2), "target_modules": ["q_proj"]}, [0, 1]),
        ({"layers_to_transform": np.arange(2), "target_modules": ["q_proj"]}, [0, 1]),
        ({"modules_to_save": {"norm", "lm_head"}}, ["lm_head", "norm"]),
        ({"target_modules": ("q_proj", "k_proj")}, ["q_proj", "k_proj"]),
        ({"lora_alpha": np.float32(16)}, 16.0),
        ({"lora_alpha": torch.tensor(16.0)}, 16.0),
        ({"alpha_pattern": {"q_proj": np.float64(2)}}, {"q_proj": 2.0}),
        ({"use_dora": np.bool_(True)}, True),
        ({"r": np.int64(4)}, 4),
    ],
)
def test_what_is_kept_as_json_has_it(settings, kept):
    """Whatever is taken at the start can be written when training has ended."""
    config = LoraConfig(**settings)
    value = getattr(config, next(iter(settings)))
    assert value == kept and type(value) is type(kept)
    assert LoraConfig.from_peft(json.loads(json.dumps(config.to_peft(torch.nn.Module()))), "file") == config
