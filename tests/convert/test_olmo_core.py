"""Checkpoints of OLMo-core become runs: every byte, its logits, its next step; what is not read is refused by name.

The checkpoints and what is expected of them are OLMo-core's own (tests/make_olmo_core_checkpoints.py), after 3 of 10 steps.
"""

import hashlib
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.checkpoint import load, read_index, steps
from olmo_fn.cli import main as cli
from olmo_fn.convert.olmo_core_training import SCHEDULES, lost, training
from olmo_fn.formats.names import stored
from olmo_fn.formats.olmo_core_files import open_checkpoint
from olmo_fn.formats.olmo_core_model import model
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.train.folder import read_config
from olmo_fn.train.session import load_parameters, open_run

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(path.name.removesuffix(".tar.xz") for path in (FIXTURES / "olmo_core").glob("*.tar.xz"))
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Each case: its folder, with the checkpoint in run/step3, and the run that it becomes in ours."""
    folder = tmp_path_factory.mktemp("olmo_core")
    for case in CASES:
        with tarfile.open(FIXTURES / "olmo_core" / f"{case}.tar.xz") as archive:
            archive.extractall(folder / case, filter="data")
    return folder


@pytest.fixture(scope="module")
def runs(unpacked):
    for case in CASES:
        words = ["--data-paths", str(unpacked / case / "tokens.npy")]
        assert convert(unpacked / case / "run", unpacked / case / "ours", *words) == 0
    return unpacked


@pytest.fixture
def copy(unpacked, tmp_path):
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(unpacked / "olmo2" / "run" / "step3", tmp_path / "step3"))


def convert(*words):
    return cli.main(["convert", "from-olmo-core", *map(str, words)])


def experts(config):
    """The config with experts in the place of its feed-forward network, which is what they are."""
    block = config["model"]["block"]
    block.pop("feed_forward", None)
    block["name"], sizes = "moe_reordered_norm", {"num_experts": 4, "hidden_size": 4}
    return block.setdefault("feed_forward_moe", {"name": "dropless", "router": {"top_k": 2}, **sizes})


def refused(capsys, *words):
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert convert(*words) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def edit(step, change):
    """Change a checkpoint's config.json."""
    config = json.loads((step / "config.json").read_text())
    change(config)
    (step / "config.json").write_text(json.dumps(config))


def in_their_form(run, case, slot):
    """The parameters, or a slot of them, under OLMo-core's names and in its layout."""
    cfg = read_config(run)
    names = stored(cfg.model, "olmo_core")
    found, _ = load(run / "checkpoints" / "step3")
    values = tree.flatten(tree.at(found, slot))
    return {name.name: name.theirs(values[path]) for path, name in names.items()}


def test_there_are_cases_of_both_versions_and_of_ranks():
    assert CASES == ["olmo2", "olmo2-gqa-fsdp", "olmo3-2.x", "pre-norm-tied"]


@pytest.mark.parametrize("case", CASES)
def test_every_byte_is_there(runs, case):
    expected = json.loads((runs / case / "expected.json").read_text())
    run, left = runs / case / "ours", dict(expected)
    for slot, name in (
        ("params", "model.{}"),
        ("slots.adamw_m", "optim.state.{}.exp_avg"),
        ("slots.adamw_v", "optim.state.{}.exp_avg_sq"),
    ):
        for theirs, value in in_their_form(run, case, slot).items():
            there = left.pop(name.format(theirs))
            assert list(value.shape) == there["shape"]
            assert hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() == there["sha256"], (slot, theirs)
    left.pop("model.lm_head.w_out.weight" if case == "pre-norm-tied" else "", None)
    found, meta = load(run / "checkpoints" / "step3")
    assert found["step"] == 3
    count = found["slots"]["adamw"]["count"]
    assert count == 4  # torch makes an empty update to set up the state, as these runs have saved a step 0
    assert all(name.endswith(".step") for name in left)
    assert {there["sha256"] for there in left.values()} == {hashlib.sha256(count.float().numpy().tobytes()).hexdigest()}
    assert meta["tokens"] == 3 * 64
    theirs = meta["olmo_core"]
    assert (theirs["step"], theirs["max_steps"], theirs["tokens"]) == (3, 10, 192)
    assert [theirs["data"][name] for name in ("seed", "epoch", "batches_processed", "tokens_processed")] == [34521, 1, 3, 192]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_olmo_cores(runs, case):
    expected = load_file(runs / case / "expected.safetensors")
    session, params, _ = load_parameters(runs / case / "ours")
    assert_close(transformer.logits(session.cfg.model, params, {"input_ids": expected["ids"]}), expected["logits"], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_the_next_step_is_olmo_cores(runs, case):
    """On the batch that comes next in the order of the data, at the rate of the schedule."""
    expected = load_file(runs / case / "expected.safetensors")
    cfg = read_config(runs / case / "ours")
    session = open_run(replace(cfg, recipe=replace(cfg.recipe, compile=False)))
    state = session.resume().state
    state, metrics = session.step(state, session.batch(3))
    assert state.step == 4
    names = stored(session.cfg.model, "olmo_core")
    for slot, name in ((state.params, "model.{}"), (state.slots["adamw_m"], "optim.state.{}.exp_avg")):
        values = tree.flatten(slot)
        for path, theirs in names.items():
            ours, there = theirs.theirs(values[path]), expected[name.format(theirs.name)]
            assert (ours - there).abs().max() <= 1e-5 * there.abs().max(), (path, name)
    assert not metrics["skipped"]


def test_the_run_goes_on_by_its_command(runs, tmp_path, capsys):
    run = Path(shutil.copytree(runs / "olmo2" / "ours", tmp_path / "ours"))
    flags = ["--recipe.no-compile", "--run.threads", "1", "--run.sample=", "--run.folder", str(run)]
    assert cli.main(["train", str(run), *flags]) == 0
    assert steps(run / "checkpoints") == [3, 10]
    rates = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rates if "lr" in row] == [4, 5, 6, 7, 8, 9, 10]


def test_without_moments_a_training_begins_anew(unpacked, tmp_path, capsys):
    assert convert(unpacked / "olmo2" / "run", tmp_path / "run", "--params-only") == 0
    index = read_index(tmp_path / "run" / "checkpoints" / "step0")
    assert {name.partition(".")[0] for name in index.tensors} == {"params"}
    assert "--run.start-with params" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_unsharded_checkpoints_are_the_same(unpacked, tmp_path, kind):
    assert convert(unpacked / "olmo2" / f"unsharded-{kind}", tmp_path / "run", "--params-only") == 0
    names, values = (
        stored(read_config(tmp_path / "run").model, "olmo_core"),
        load(tmp_path / "run" / "checkpoints" / "step0")[0],
    )
    expected = json.loads((unpacked / "olmo2" / "expected.json").read_text())
    for path, name in names.items():
        data = name.theirs(tree.at(values["params"], path)).contiguous().numpy().tobytes()
        assert hashlib.sha256(data).hexdigest() == expected[f"model.{name.name}"]["sha256"]


def test_an_unsharded_optimizer_goes_on(runs, tmp_path):
    folder = Path(shutil.copytree(runs / "olmo2" / "unsharded-pt", tmp_path / "unsharded"))
    shutil.copytree(runs / "olmo2" / "run" / "step3" / "train", folder / "train")
    assert convert(folder, tmp_path / "run", "--data-paths", runs / "olmo2" / "tokens.npy") == 0
    there, _ = load(runs / "olmo2" / "ours" / "checkpoints" / "step3")
    found, _ = load(tmp_path / "run" / "checkpoints" / "step3")
    for path, value in tree.items(there):
        assert torch.equal(tree.at(found, path), value), path


def rewrite(step, change):
    """Write a checkpoint's tensors anew, as torch does, with some of them changed."""
    tensors = {name: tensor.make() for name, tensor in open_checkpoint(step).tensors.items()}
    change(tensors)
    shutil.rmtree(step / "model_and_optim")
    dcp.save(tensors, checkpoint_id=step / "model_and_optim", no_dist=True)


def test_other_dtypes(copy, tmp_path, capsys):
    before = {name: tensor.make() for name, tensor in open_checkpoint(copy).tensors.items()}
    rewrite(copy, lambda ts: ts.update((name, x.bfloat16()) for name, x in ts.items() if not name.endswith(".step")))
    assert convert(copy, tmp_path / "run") == 0
    assert read_config(tmp_path / "run").optim.moments == "bfloat16"
    found, _ = load(tmp_path / "run" / "checkpoints" / "step3")
    assert torch.equal(found["params"]["embed"], before["model.embeddings.weight"].bfloat16().float())
    moment = found["slots"]["adamw_v"]["embed"]
    assert moment.dtype == torch.bfloat16
    assert torch.equal(moment, before["optim.state.embeddings.weight.exp_avg_sq"].bfloat16())
    rewrite(copy, lambda ts: ts.update({"optim.state.embeddings.weight.exp_avg": before["model.embeddings.weight"]}))
    assert "moments are in bfloat16 and float32; they must be all in" in refused(capsys, copy, tmp_path / "other")


def test_counts_that_do_not_agree(copy, tmp_path, capsys):
    rewrite(copy, lambda ts: ts.update({"optim.state.embeddings.weight.step": torch.tensor(9.0)}))
    said = refused(capsys, copy, tmp_path / "run")
    assert "AdamW has made 9 updates of embeddings.weight and 4 of blocks.0.attention.w_q.weight" in said
    rewrite(copy, lambda ts: ts.update({name: torch.tensor(0.5) for name in ts if name.endswith(".step")}))
    assert "is 0.5, which is no number of updates" in refused(capsys, copy, tmp_path / "run")


# What does not fit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["model"].update(n_layers=3), "lacks model.blocks.2.attention.w_q.weight [8, 8]"),
        (lambda c: c["model"].update(n_layers=1), "for which its config.json has no place"),
        (lambda c: c["model"].update(d_model=16), "model.embeddings.weight is [64, 8], and [64, 16] by its config.json"),
        (
            lambda c: c["model"]["block"].update(name="moe_reordered_norm"),
            "block.feed_forward_moe is null",
        ),
        (
            lambda c: c["model"]["block"].update(feed_forward_moe={"name": "default"}),
            "feed_forward_moe is a group of 1",
        ),
        (
            lambda c: experts(c).update(name="dropped"),
            "feed_forward_moe.name is 'dropped', and only 'default' or",
        ),
        (
            lambda c: experts(c)["router"].update(uniform_expert_assignment=True),
            "uniform_expert_assignment is True",
        ),
        (lambda c: experts(c).update(latent_moe={"latent_dim": 4, "bias": True}), "latent_moe.bias is True, and only False"),
        (lambda c: experts(c).update(shared_mlp={"hidden_size": 8}), "shared_mlp is not the kind that is read: silu, without"),
        (lambda c: experts(c)["router"].update(top_k=9), "--model.top-k is 9, and there are 4 experts"),
        (
            lambda c: experts(c)["router"].update(emo=1),
            "feed_forward_moe.router.emo is 1, which is not read",
        ),
        (
            lambda c: experts(c),
            "lacks model.blocks.0.feed_forward_moe.router.weight [32]",
        ),
        (lambda c: attention(c).update(type="nemotron_mamba2"), "a nemotron_mamba2, and of mixers only attention and gated"),
        (lambda c: attention(c).update(type="gated_delta_net", conv_bias=True), "conv_bias is True, and only False is read"),
        (lambda c: attention(c).update(dropout=0.1), "model.block.sequence_mixer.dropout is 0.1, and only 0.0 is read"),
        (lambda c: attention(c).update(soft_cap=30.0), "sequence_mixer.soft_cap is 30.0, which is not read, and would be lost"),
        (
            lambda c: attention(c).update(name="fused_v2"),
            "mixer.name is 'fused_v2', and only 'default' or 'normalized'",
        ),
        (lambda c: attention(c)["qk_norm"].pop("bias"), "qk_norm.bias is true or not there"),
        (
            lambda c: attention(c)["qk_norm"].update(eps=1e-5),
            "its norms are of different kinds, rms with eps 1e-05 and",
        ),
        (
            lambda c: attention(c)["rope"].update(scaling={"_CLASS_": "x.NTKRoPEScalingConfig"}),
            "only ABF, PI, Stepwise",
        ),
        (lambda c: attention(c).update(n_heads="2"), "sequence_mixer.n_heads is '2'; it must be a whole number"),
        (lambda c: c["model"]["block"]["feed_forward"].update(activation="relu"), "feed_forward.activation is 'relu'"),
        (lambda c: c["model"].update(freeze_params=["embeddings.*"]), "model.freeze_params is a list of 1, which is not read"),
        (lambda c: c["model"].update(mtp_heads=2), "model.mtp_heads is 2, which is not read, and would be lost"),
        (lambda c: c.pop("model"), "model is null; it must be a group of fields"),
        (lambda c: c["train_module"]["optim"].update(_CLASS_="olmo_core.optim.LionConfig"), "is a LionConfig; read are AdamW"),
        (lambda c: c["train_module"]["optim"].update(amsgrad=True), "train_module.optim.amsgrad is True, which is not read"),
        (
            lambda c: c["train_module"]["scheduler"].update(_CLASS_="x.SequentialScheduler"),
            "is a SequentialScheduler; read",
        ),
        (lambda c: c["train_module"].update(label_smoothing=0.1), "train_module.label_smoothing is 0.1, which is not read"),
        (
            lambda c: c["data_loader"].update(global_batch_size=65),
            "size is 65 and train_module.max_sequence_length 16",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(copy, tmp_path, capsys, change, says):
    edit(copy, change)
    said = refused(capsys, copy, tmp_path / "run")
    assert says in said
    assert not (tmp_path / "run").exists()
    assert said.endswith("takes the model alone") == ("train_module." in said)


def attention(config):
    return config["model"]["block"]["sequence_mixer"]


def test_what_is_no_checkpoint(copy, tmp_path, capsys):
    run = tmp_path / "run"
    assert "is not there" in refused(capsys, tmp_path / "nowhere", run)
    assert "is no folder" in refused(capsys, copy / "config.json", run)
    assert "is no checkpoint of OLMo-core" in refused(capsys, copy / "train", run)
    (tmp_path / "there").mkdir()
    assert "is there already" in refused(capsys, copy, tmp_path / "there")
    shutil.move(copy / "train", tmp_path / "train")
    assert "no train/rank0.pt, and so no step to go on from; --params-only" in refused(capsys, copy, run)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text("[" * 100_000)
    assert "is no JSON" in refused(capsys, copy, run)
    (copy / "config.json").unlink()
    assert "there is no config.json" in refused(capsys, copy, run)
    (tmp_path / "c.json").write_text(config)
    assert convert(copy, run, "--params-only", "--config", tmp_path / "c.json") == 0


def test_a_tied_head_must_be_the_embedding(unpacked, tmp_path, capsys):
    step = Path(shutil.copytree(unpacked / "olmo2" / "run" / "step3", tmp_path / "step3"))
    edit(step, lambda c: c["model"].update(tie_word_embeddings=True))
    said = refused(capsys, step, tmp_path / "run", "--params-only")
    assert "model.lm_head.w_out.weight is not model.embeddings.weight, though tie_word_embeddings is true" in said


def test_a_longer_schedule_than_the_run_keeps_its_rates(unpacked, tmp_path, copy, capsys):
    edit(copy, lambda c: c["train_module"]["scheduler"].update(t_max=40))
    assert convert(copy, tmp_path / "run") == 0
    assert read_config(tmp_path / "run").run.steps == 40
    assert "the schedule is of 40, OLMo-core's run of 10" in capsys.readouterr().out


def test_what_is_not_carried_over_is_said(copy, tmp_path, capsys):
    def change(config):
        config["dataset"] |= {"instance_filter_config": {"repetition_max_count": 32}, "max_target_sequence_length": 16}
        config["trainer"]["callbacks"]["b"] = {"_CLASS_": "olmo_core.train.callbacks.BatchSizeSchedulerCallback"}

    edit(copy, change)
    assert convert(copy, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "not kept:      dataset.instance_filter_config, trainer.callbacks.b (BatchSizeSchedulerCallback)\n" in said
    assert "OLMo-core was behind batch 3 of epoch 1, and the next batch may be another here" in said


def test_without_token_files_no_run_goes_on(copy, tmp_path, capsys):
    (copy / "data_paths.txt").unlink()
    edit(copy, lambda c: c["dataset"].pop("paths"))
    assert "names no token files to go on with; give --data-paths" in refused(capsys, copy, tmp_path / "run")


# Configs


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.sampled_from(["", "default", "moe", "9" * 5000]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "0", "params", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@examples(200)
@given(data=st.data())
def test_no_config_gives_a_traceback(data):
    """A value anywhere in it is replaced by another one; all that is raised is a ValueError in one line."""
    config = json.loads(SMALL)
    group, names = config, []
    while True:
        name = data.draw(st.sampled_from(sorted(group)))
        names.append(name)
        if not isinstance(group[name], dict) or not group[name] or data.draw(st.booleans()):
            break
        group = group[name]
    group[name] = data.draw(JSON)
    try:
        training(config, model(config), {"embed": "embeddings.weight"}, None).check()
        lost(config)
    except ValueError as error:
        said = str(error)
        assert "\n" not in said, said
        assert len(said) < 500, said


SMALL = json.dumps(
    {
        "model": {
            "d_model": 8,
            "n_layers": 2,
            "vocab_size": 64,
            "block": {
                "name": "reordered_norm",
                "sequence_mixer": {
                    "n_heads": 2,
                    "bias": False,
                    "qk_norm": {"name": "rms", "bias": False, "eps": 1e-6},
                    "rope": {"theta": 10_000, "scaling": {"_CLASS_": "x.StepwiseRoPEScalingConfig", "factor": 8.0}},
                    "sliding_window": {"pattern": [4, -1], "force_full_attention_on_last_layer": False},
                    "gate": {"granularity": "headwise"},
                },
                "feed_forward": {"hidden_size": 12, "bias": False},
                "layer_norm": {"name": "rms", "bias": False, "eps": 1e-6},
            },
            "block_pattern": [],
            "block_overrides": {},
            "lm_head": {"bias": False, "layer_norm": {"name": "rms", "bias": False, "eps": 1e-6}},
        },
        "dataset": {"sequence_length": 16, "paths": ["x"], "tokenizer": {"eos_token_id": 1}, "dtype": "uint8"},
        "data_loader": {"global_batch_size": 64, "seed": 3},
        "train_module": {
            "optim": {
                "_CLASS_": "x.SkipStepAdamWConfig",
                "lr": 1e-3,
                "betas": [0.9, 0.95],
                "group_overrides": [{"params": ["embeddings.weight"], "opts": {"weight_decay": 0.0}}],
            },
            "scheduler": {"_CLASS_": "x.WSDS", "period_lengths": [10, 20], "warmup": 2, "decay_fraction": 0.1},
            "max_grad_norm": 1.0,
            "float8_config": {"enabled": False},
        },
        "trainer": {"max_duration": {"value": 30, "unit": "steps"}},
    }
)


READ = [
    path
    for path in sorted((FIXTURES / "models").glob("*.json"))
    if path.stem not in ("olmo_hybrid", "qwen3_5_hybrid", "moe_capacity")  # its logits are those of a loss, with drops
]


@pytest.mark.parametrize("path", READ, ids=lambda path: path.stem)
def test_models_of_every_kind_are_read(path):
    """OLMo-core's own config, weights and logits of each of the models in tests/fixtures/models."""
    made = model({"model": json.loads(path.read_text())["olmo_core_config"]})
    tensors = load_file(path.with_suffix(".safetensors"))
    weights = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith(("param.", "buffer."))}
    params = tree.unflatten((ours, name.ours(weights[name.name])) for ours, name in stored(made, "olmo_core").items())
    assert_close(transformer.logits(made, params, {"input_ids": tensors["input_ids"]}), tensors["logits"], **CLOSE)


@pytest.mark.parametrize("name", ["moe_sigmoid_bias", "moe_capacity", "moe_hybrid"])
def test_a_run_of_experts_goes_on(name, copy, tmp_path, monkeypatch):
    """A checkpoint with the weights of a model with experts, and moments of all but the biases, which are buffers there."""
    tensors = load_file(FIXTURES / "models" / f"{name}.safetensors")
    config = json.loads((FIXTURES / "models" / f"{name}.json").read_text())["olmo_core_config"]
    weights = {key.partition(".")[2]: x for key, x in tensors.items() if key.startswith(("param.", "buffer."))}
    moved = [key for key in weights if not key.endswith("score_bias")]
    steps = {f"optim.state.{key}.step": torch.tensor(3.0) for key in moved}
    moments = {f"optim.state.{key}.{slot}": 0.1 * weights[key] ** 2 for key in moved for slot in ("exp_avg", "exp_avg_sq")}
    edit(copy, lambda c: c.update(model=config))
    shutil.rmtree(copy / "model_and_optim")
    every = {f"model.{key}": x for key, x in weights.items()} | steps | moments
    dcp.save(every, checkpoint_id=copy / "model_and_optim", no_dist=True)
    assert convert(copy, tmp_path / "run", "--data-paths", copy / "tokens.npy") == 0
    cfg, (found, _) = read_config(tmp_path / "run"), load(tmp_path / "run" / "checkpoints" / "step3")
    names = stored(cfg.model, "olmo_core")
    for path, one in names.items():
        assert one.theirs(tree.at(found["params"], path)).equal(weights[one.name]), path
        biased = path.endswith("router_bias")
        assert biased == (path not in tree.flatten(found["slots"]["adamw_v"]))
        assert biased or one.theirs(tree.at(found["slots"]["adamw_v"], path)).equal(0.1 * weights[one.name] ** 2)
    session = open_run(replace(cfg, recipe=replace(cfg.recipe, compile=False)))
    state = session.resume().state
    ids = tensors["input_ids"][:, :16]
    after, metrics = session.step(state, {"input_ids": ids, "labels": ids.roll(-1, 1)})
    assert after.step == 4
    assert bool(metrics["router_balance"] > 0)


RATES = json.loads((FIXTURES / "sched" / "schedulers.json").read_text())["cases"]


@pytest.mark.parametrize("case", RATES, ids=lambda case: f"{case['scheduler']}-{case['settings']}")
def test_schedules_have_olmo_cores_rates(case):
    kind, settings, lr, total = (case[name] for name in ("scheduler", "settings", "initial_lr", "t_max"))
    module = {
        "max_sequence_length": 16,
        "optim": {"_CLASS_": "olmo_core.optim.AdamWConfig", "lr": lr},
        "scheduler": {"_CLASS_": f"olmo_core.optim.scheduler.{kind}", **settings},
    }
    config = {"train_module": module, "data_loader": {"global_batch_size": 16}}
    if kind not in SCHEDULES:
        with pytest.raises(ValueError, match=f"is a {kind}; read are"):
            training(config, dense(8, 1, 2, 8), {}, total)
        return
    if "t_max" in settings and settings["t_max"] < total:
        with pytest.raises(ValueError, match="t_max is"):
            training(config, dense(8, 1, 2, 8), {}, total)
        return
    cfg = training(config, dense(8, 1, 2, 8), {}, total)
    rate = cfg.schedule.build(cfg.optim.lr, cfg.run.steps)
    for step, expected in zip(case["current"], case["lr"], strict=True):
        if expected is not None and step <= cfg.run.steps:
            assert rate(torch.tensor(step)).item() == pytest.approx(expected, rel=1e-12, abs=1e-16 * lr), step
