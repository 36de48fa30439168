"""Which engine a launch has, what it refuses, and the files that start it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from models_for_tests import small_tokenizer, tiny_model

from unlearn_llm import pipeline, recipe_files
from unlearn_llm.combine import Combination
from unlearn_llm.config import UnlearnConfig
from unlearn_llm.engines import Engine, check_engine, check_kind, engine_of
from unlearn_llm.errors import UserError
from unlearn_llm.objective import Objective
from unlearn_llm.recipe import Recipe
from unlearn_llm.reference import Precomputed
from unlearn_llm.resources import RECIPES

FILES = sorted((RECIPES / "accelerate").glob("*.yaml"))
ZERO = {
    "stage": 3,
    "offload_optimizer": {"device": "none"},
    "stage3_gather_16bit_weights_on_model_save": True,
}


@pytest.fixture
def arguments(tmp_path):
    """Makes arguments as a launch on GPUs would have them."""

    def make(*, zero=None, fsdp=None, deepspeed=None, on=DistributedType.MULTI_GPU, **settings):
        args = UnlearnConfig(str(tmp_path), use_cpu=True, report_to="none", **settings)
        args.distributed_state = SimpleNamespace(distributed_type=on)
        if zero is not None:
            config = {"zero_optimization": {**ZERO, "stage": zero}, **(deepspeed or {})}
            args.deepspeed_plugin = SimpleNamespace(
                zero_stage=zero, hf_ds_config=SimpleNamespace(config=config)
            )
        args.fsdp_plugin_args = fsdp
        return args

    return make


FSDP2 = {"fsdp": {"fsdp_version": 2}}


def test_one_process_and_ddp_are_not_sharded(arguments):
    engine = engine_of(arguments())
    assert (engine, engine.sharded) == (Engine("DDP"), False)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"zero": 1}, "DeepSpeed ZeRO-1"),
        ({"zero": 2}, "DeepSpeed ZeRO-2"),
        ({"zero": 3}, "DeepSpeed ZeRO-3"),
        (FSDP2, "FSDP2"),
    ],
)
def test_engines_are_recognised(arguments, given, name):
    engine = check_kind(arguments(**given))
    assert (engine.name, engine.sharded) == (name, True)


def test_fsdp_is_recognised_by_what_accelerate_launch_sets(arguments, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert engine_of(arguments()) == Engine("FSDP2", fsdp=2)


@pytest.mark.parametrize("on", [DistributedType.NO, DistributedType.MULTI_CPU])
@pytest.mark.parametrize("given", [FSDP2, {"zero": 2}])
def test_an_engine_that_accelerate_would_leave_out_is_refused(arguments, on, given):
    with pytest.raises(UserError, match=r"does not use it on a CPU.*ddp\.yaml"):
        engine_of(arguments(**given, on=on))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp": {"fsdp_version": 1}}, "FSDP1 is not supported.*fsdp_version: 2"),
        ({"fsdp": {"fsdp_version": 2, "cpu_offload": True}}, "FSDP2: offloading"),
        (
            {
                "zero": 2,
                "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            },
            "ZeRO-2: offloading",
        ),
        ({"zero": 3, "deepspeed": {"zero_optimization": {"stage": 3}}}, "zero3_save_16bit_model"),
    ],
)
def test_kinds_that_do_not_work_are_refused(arguments, given, message):
    with pytest.raises(UserError, match=message):
        check_kind(arguments(**given))


EIGHT = {"optimizer": "dual_adamw_plus", "optimizer_parameters": {"state_bits": 8}}
REFUSED = [
    ({"zero": 2, **EIGHT}, "state_bits: 8 does not work under DeepSpeed ZeRO-2"),
    ({"zero": 2, "deepspeed": {"optimizer": {"type": "Adam"}}}, "file names an optimizer"),
    ({**FSDP2, "optim": "adamw_bnb_8bit"}, "adamw_bnb_8bit is of bitsandbytes"),
    ({**FSDP2, "objective": "idk+kl"}, "kl compares with a whole reference model"),
    ({"zero": 1, "objective": "npo+gd", "reference": "frozen"}, "npo compares with a whole"),
    ({"zero": 3, "objective": "rmu+gd", "forget_parameters": {"layers": [0]}}, "hidden states"),
    ({**FSDP2, "eval_strategy": "steps", "eval_steps": 1}, "a suite needs them whole"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_settings_that_do_not_work_are_refused_in_one_line(arguments, given, message):
    args = arguments(**given)
    with pytest.raises(UserError, match=message) as caught:
        check_engine(args, args.build_objective(), combination=Combination())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [FSDP2, {"zero": 1}, {"zero": 3}])
def test_what_works_is_accepted(arguments, given):
    for objective in ("idk+gd", "npo+gd", "dpo+ap"):
        args = arguments(**given, objective=objective, optimizer="dual_adamw_plus")
        check_engine(args, args.build_objective(), combination=Combination())
    eight = arguments(fsdp={"fsdp_version": 2}, **EIGHT)
    check_engine(eight, eight.build_objective(), combination=Combination())


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        ({"zero": 2}, {"combine": "surgery"}, "flat buffers.*fsdp2.yaml"),
        (FSDP2, {"combine": "gru", "sharded": False}, "a memory of whole gradients"),
        (FSDP2, {"mask": "salun"}, "mask: salun holds entries of whole parameters"),
    ],
)
def test_what_reads_whole_gradients_is_refused(arguments, given, words, message):
    combination = SimpleNamespace(sharded=words.pop("sharded", True))
    with pytest.raises(UserError, match=message):
        check_engine(
            arguments(**given), Objective.parse("idk+gd"), combination=combination, **words
        )


def test_four_bits_are_not_spread_over_ranks(arguments):
    with pytest.raises(UserError, match=r"model\.four_bit: .* Launch with"):
        check_kind(arguments(**FSDP2), four_bit=True)


def test_a_refusal_comes_before_weights_are_loaded(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    recipe = Recipe.load(
        "synthetic/unlearn",
        [f"model.path={tmp_path / 'model'}", f"train.output_dir={tmp_path / 'run'}",
         "train.use_cpu=true", "evaluate=null"],
    )  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(pipeline, "load_model", lambda settings: pytest.fail("loaded"))
    with pytest.raises(UserError, match="accelerate does not use it on a CPU"):
        pipeline.run_train(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_our_files(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == 2
    parser = launch.launch_command_parser()
    args, _, _ = launch._validate_launch_command(
        parser.parse_args(["--config_file", str(file), "script.py"])
    )
    kinds = {"ddp": args.multi_gpu, "fsdp2": args.use_fsdp}
    assert kinds.get(file.stem, args.use_deepspeed)
    if file.stem == "fsdp2":
        assert args.fsdp_version == 2
        assert args.fsdp_state_dict_type == "SHARDED_STATE_DICT"
    if args.use_deepspeed:
        assert args.zero_stage == int(file.stem[-1])
        assert (args.gradient_clipping, args.gradient_accumulation_steps) == ("auto", "auto")


def test_there_is_a_file_for_every_engine_and_none_is_a_recipe():
    assert [file.stem for file in FILES] == ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
    assert not [name for name in recipe_files.names() if name.startswith("accelerate")]


def test_cached_log_probabilities_survive_a_checkpoint():
    logps = {"forget": {"idk": [torch.rand(3), torch.rand(0), torch.rand(5)]}}
    back = Precomputed.from_state(Precomputed(logps).state()).token_logps
    assert all(map(torch.equal, back["forget"]["idk"], logps["forget"]["idk"]))
