import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from megatron_flowrl.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    UserError,
    load_config,
    to_dict,
    to_yaml,
)
from megatron_flowrl.config.keys import KEYS


def problems_of(recipe: Path | str | None, *overrides: str, **options: object) -> tuple[str, ...]:
    with pytest.raises(UserError) as raised:
        load_config(recipe, overrides, **options)
    return raised.value.problems


class TestValues:
    def test_nothing_given_is_the_defaults(self, recipe):
        assert load_config(None) == load_config(recipe("")) == load_config(recipe("# only this\n")) == Config()

    def test_override_beats_recipe_beats_default(self, recipe):
        path = recipe("optimizer:\n  lr: 3e-6\n  clip_grad: 0.5\n")
        optimizer = load_config(path, ["optimizer.lr=7e-6"]).optimizer
        assert (optimizer.lr, optimizer.clip_grad, optimizer.adam_beta2) == (7e-6, 0.5, 0.999)

    def test_loading_leaves_the_defaults_alone(self):
        load_config(None, ["parallel.tensor_model_parallel_size=8", "seed=1"])
        assert Config().parallel.tensor_model_parallel_size == 1
        assert Config().seed == 1234

    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("optimizer.lr=1e-6", 1e-6),
            ("optimizer.lr=1", 1.0),
            ("optimizer.clip_grad=.5", 0.5),
            ("data.tokens_per_micro_batch=32_768", 32768),
            ("recompute.recompute_modules=[mlp, core_attn]", ("mlp", "core_attn")),
            ("precision.fp8=null", None),
            ("log_prob.entropy=true", True),
            ("model.path=/models/a=b", "/models/a=b"),
            ("model.path='1e-6'", "1e-6"),
            ("model.path=off", "off"),
            (" model.init = random ", "random"),
        ],
    )
    def test_override_value(self, override, value):
        key = override.partition("=")[0].strip()
        section, name = key.split(".")
        found = getattr(getattr(load_config(None, [override]), section), name)
        assert found == value and type(found) is type(value)

    def test_same_override_twice_with_one_value_is_accepted(self):
        assert load_config(None, ["optimizer.lr=1e-3", "optimizer.lr=0.001"]).optimizer.lr == 1e-3

    def test_recipe_keys_may_be_dotted_and_a_section_may_be_empty(self, recipe):
        config = load_config(recipe("model:\nparallel.context_parallel_size: 2\n"))
        assert config == Config(parallel=ParallelConfig(context_parallel_size=2))

    def test_recipe_may_start_with_a_byte_order_mark(self, recipe):
        assert load_config(recipe(b"\xef\xbb\xbfseed: 7\n")).seed == 7

    def test_config_is_frozen_and_has_no_other_fields(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            Config().seed = 2
        with pytest.raises(ValueError, match="tensor_parallel"):
            ParallelConfig(tensor_parallel=2)


class TestSections:
    def test_override_that_the_command_does_not_read_is_refused(self):
        (problem,) = problems_of(None, "optimizer.lr=1", "seed=3", sections=("seed", "model"), command="score")
        assert "`score` does not read optimizer.lr" in problem and "seed, model" in problem

    def test_seed_is_a_section_of_its_own(self):
        (problem,) = problems_of(None, "seed=3", sections=("model",), command="convert")
        assert "`convert` does not read seed" in problem

    def test_recipe_may_hold_sections_of_other_commands(self, recipe):
        config = load_config(recipe("optimizer: {lr: 0.5}\n"), ["model.path=x"], sections=("model",))
        assert config.optimizer.lr == 0.5

    def test_recipe_is_judged_in_the_sections_of_other_commands_too(self, recipe):
        (problem,) = problems_of(recipe("optimizer: {lr: fast}\n"), sections=("model",))
        assert "optimizer.lr = fast" in problem


BAD_OVERRIDES = [
    # Names.
    ("seeds=1", ["seeds", "seed"]),
    (
        "optimizer.learning_rate=1",
        ["optimizer.learning_rate", "the keys of optimizer are lr, weight_decay, "],
    ),
    ("optimizer.lrr=1", ["optimizer.lrr", "did you mean optimizer.lr?"]),
    ("tensor_model_parallel_size=2", ["did you mean parallel.tensor_model_parallel_size?"]),
    ("parallel.tensor_parallel_size=2", ["did you mean parallel.tensor_model_parallel_size?"]),
    (
        "precision.tensor_model_parallel_size=2",
        ["precision.tensor_model_parallel_size", "did you mean parallel.tensor_model_parallel_size?"],
    ),
    ("paralel.context_parallel_size=2", ["did you mean parallel.context_parallel_size?"]),
    ("reference.xyzzy=2", ["reference.xyzzy", "the keys of reference are placement"]),
    ("xyzzy=2", ["xyzzy", "the sections are run, model, parallel, "]),
    ("optimizer.=2", ["optimizer.:", "the keys of optimizer are lr, "]),
    (".seed=2", [".seed", "did you mean seed?"]),
    # Shapes.
    ("parallel=2", ["parallel is a section", "tensor_model_parallel_size"]),
    ("parallel={context_parallel_size: 2}", ["parallel is a section", "context_parallel_size"]),
    ("optimizer.lr.min=2", ["optimizer.lr.min", "optimizer.lr is a single value (float >= 0)"]),
    ("seed.x=2", ["seed.x", "seed is a single value"]),
    ("optimizer.lr", ["'optimizer.lr' is not a setting", "section.key=value"]),
    ("=3", ["'=3' is not a setting", "section.key=value"]),
    ("data.tokenizer=", ["data.tokenizer", "no value", "data.tokenizer=null"]),
    ("model.path=#1", ["model.path = #1", "no value"]),
    ("model.path=runs/a #1", ["model.path = runs/a #1", "reads runs/a and no further", "quotes"]),
    ("model.path=@home", ["model.path = @home", "quotes"]),
    ("model.path=[a", ["model.path = [a", "quotes"]),
    ("model.path=!!python/name:os.system", ["model.path", "not a YAML value"]),
    ("seed=" + "9" * 5000, ["seed", "not a YAML value"]),
    # Types and ranges.
    ("seed=-1", ["seed = -1", "must be int >= 0"]),
    ("seed=4294967296", ["seed = 4294967296", "< 4294967296"]),
    ("seed=1.0", ["seed = 1.0", "must be int"]),
    ("seed=012", ["seed = 012", "must be int"]),
    ('seed="1"', ['seed = "1"', "must be int"]),
    ("seed=true", ["seed = true", "must be int"]),
    ("seed=null", ["seed = null", "must be int"]),
    ("optimizer.lr=true", ["optimizer.lr = true", "must be float >= 0"]),
    ("optimizer.lr=fast", ["optimizer.lr = fast", "must be float >= 0"]),
    ("optimizer.lr=.inf", ["optimizer.lr = .inf", "must be float >= 0"]),
    ("optimizer.lr=.nan", ["optimizer.lr = .nan", "must be float >= 0"]),
    ("optimizer.lr=-1e-6", ["optimizer.lr = -1e-6", "must be float >= 0"]),
    ("optimizer.lr=[1]", ["optimizer.lr = [1]", "must be float >= 0"]),
    ("optimizer.lr={min: 1}", ["optimizer.lr = {min: 1}", "must be float >= 0"]),
    ("optimizer.adam_beta2=1", ["optimizer.adam_beta2 = 1", "must be float >= 0 and < 1"]),
    ("log_prob.temperature=0", ["log_prob.temperature = 0", "must be float > 0"]),
    ("log_prob.chunk_bytes=1024", ["log_prob.chunk_bytes = 1024", "must be int >= 1048576"]),
    ("parallel.tensor_model_parallel_size=0", ["tensor_model_parallel_size = 0", "must be int > 0"]),
    ("parallel.virtual_pipeline_model_parallel_size=1", ["_size = 1", "must be int >= 2 or null"]),
    ("parallel.sequence_parallel=1", ["parallel.sequence_parallel = 1", "must be true or false"]),
    ("parallel.sequence_parallel=yes", ["parallel.sequence_parallel = yes", "must be true or false"]),
    ("precision.dtype=bf16", ["precision.dtype = bf16", "must be one of bfloat16, float32"]),
    ("precision.fp8=off", ["precision.fp8 = off", "must be one of e4m3, hybrid or null"]),
    (
        "recompute.recompute_modules=mlp",
        ["recompute_modules = mlp", "must be non-empty list of core_attn, mlp"],
    ),
    ("recompute.recompute_modules=[]", ["= []", "must be non-empty list of core_attn, mlp"]),
    (
        "recompute.recompute_modules=[layernorm]",
        ["= [layernorm]", "must be non-empty list of core_attn, mlp"],
    ),
    ("model.path=7", ["model.path = 7", "must be text", "quotes"]),
    ("data.tokenizer=''", ["data.tokenizer = ''", "must be non-empty text or null"]),
]


@pytest.mark.parametrize(("override", "said"), BAD_OVERRIDES, ids=[case[0][:50] for case in BAD_OVERRIDES])
def test_bad_override_is_named(override, said):
    (problem,) = problems_of(None, override)
    assert problem.startswith("command line: ")
    assert [words for words in said if words not in problem] == []


BAD_RECIPES = [
    ("optimizer:\n  lr: fast\n", 2, ["optimizer.lr = fast", "must be float >= 0"]),
    ("\n\nmodel: {path: 3}\n", 3, ["model.path = 3", "must be text"]),
    ("precision:\n  context_parallel_size: 2\n", 2, ["did you mean parallel.context_parallel_size?"]),
    ("trainer:\n  lr: 1\n", 2, ["trainer.lr", "did you mean optimizer.lr?"]),
    ("seed: {x: 1}\n", 1, ["seed = {x: 1}", "must be int"]),
    ("parallel: 2\n", 1, ["parallel is a section", "tensor_model_parallel_size"]),
    ("parallel: []\n", 1, ["parallel is a section"]),
    ("xyzzy: {}\n", 1, ["xyzzy", "the sections are"]),
    ("1: 2\n", 1, ["1: there is no such key"]),
    ("? [a, b]\n: 2\n", 1, ["[a, b]", "a key is a name"]),
    ("base: &base {lr: 1}\noptimizer:\n  <<: *base\n", 3, ["optimizer.<<"]),
    ("parallel: &p\n  x: *p\n", 2, ["parallel.x"]),
    ("seed: 1\nmodel: {path: x}\nseed: 2\n", 3, ["seed is given twice", "line 1"]),
    ("seed: 1\nseed: 1\n", 2, ["seed is given twice", "line 1"]),
    ("optimizer: {lr: 1, lr: 2}\n", 1, ["optimizer.lr is given twice"]),
    ("model: {path: x}\nmodel: {init: random}\n", 2, ["model is given twice", "line 1"]),
    ("model: {path: x}\nmodel.path: y\n", 2, ["model.path is given twice", "line 1"]),
    ("optimizer:\n  lr: !!float x\n", 2, ["optimizer.lr = !!float x", "not a YAML value"]),
    ("- seed\n", 1, ["a recipe is keys with values", "- seed"]),
    ("seed\n", 1, ["a recipe is keys with values", "not seed"]),
    ("seed: 1\nmodel: [a\n", 3, ["not valid YAML"]),
    ("seed: 1\n\tmodel: 2\n", 2, ["not valid YAML"]),
    ("seed: 1\n---\nseed: 2\n", 2, ["not valid YAML", "another document"]),
    ("seed: 1\nmodel: \x01\n", 2, ["not valid YAML"]),
    (b"seed: 1\nmodel: \xff\n", 2, ["not UTF-8", "0xff"]),
]


@pytest.mark.parametrize(("content", "line", "said"), BAD_RECIPES, ids=range(len(BAD_RECIPES)))
def test_bad_recipe_is_named_with_its_line(recipe, content, line, said):
    path = recipe(content)
    problem = "\n".join(problems_of(path))
    assert f"{path}:{line}: " in problem
    assert [words for words in said if words not in problem] == []


def test_recipe_that_cannot_be_read_is_named(tmp_path):
    (missing,) = problems_of(tmp_path / "none.yaml")
    (folder,) = problems_of(tmp_path)
    (unset,) = problems_of("")
    assert f"recipe '{tmp_path / 'none.yaml'}' cannot be read: No such file" in missing
    assert f"recipe '{tmp_path}' cannot be read: Is a directory" in folder
    assert "recipe '' cannot be read: No such file" in unset


def test_same_override_twice_with_two_values_is_refused():
    (problem,) = problems_of(None, "optimizer.lr=1", "optimizer.lr=2")
    assert "optimizer.lr is given twice, as 1 and 2" in problem


def test_all_problems_are_told_at_once(recipe):
    path = recipe("seed: x\nmodel: {pth: y}\nmodel: {}\n")
    with pytest.raises(UserError) as raised:
        load_config(path, ["optimizer.lr=z", "nonsense", "seed=-1"])
    assert len(raised.value.problems) == 6
    lines = str(raised.value).splitlines()
    assert lines[0] == "6 problems:"
    assert all(problem in line for problem, line in zip(raised.value.problems, lines[1:], strict=True))


def test_long_value_is_shortened(recipe):
    (problem,) = problems_of(recipe(f"optimizer:\n  lr: {'x' * 500}\n"))
    assert len(problem) < 250


CONFIGS = [
    Config(),
    Config(
        seed=0,
        model=ModelConfig(path="1e-6", init="random", max_sequence_length=4096),
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        recompute=RecomputeConfig(recompute_modules=("core_attn", "mlp")),
        data=DataConfig(tokenizer="null"),
    ),
    *(Config(model=ModelConfig(path=path)) for path in ["~", "off", "0x1F", "1:30", "a: b #c", "é\n\x85\t'\"", " "]),
    *(load_config(None, [f"optimizer.lr={lr}"]) for lr in ["1e-6", "1e22", "0.1", "5e-324", "123456789.12345678"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_yaml_round_trip_is_exact(recipe, config):
    text = to_yaml(config)
    assert load_config(recipe(text)) == config
    assert yaml.safe_load(text) == to_dict(config) == json.loads(json.dumps(to_dict(config)))


def test_dict_has_every_key():
    def flat(tree, prefix=""):
        for name, content in tree.items():
            yield from flat(content, f"{prefix}{name}.") if isinstance(content, dict) else [prefix + name]

    assert set(flat(to_dict(Config()))) == set(KEYS)
