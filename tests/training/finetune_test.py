"""From a published kind of checkpoint to a privately fine-tuned one that others load: the walk of the README, on a tiny
model.
"""

import functools
import json
import os
import pathlib
import shutil

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from tests.gemma import tokenizer_files
from tests.gemma.families import COMMON
from tests.gemma.hf_models import fill, load_torch
from tests.training.runs import call, ended, run, start_together

PROMPTS = ["the patient 3 came back", "she was tired and"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Gemma 3 directory with weights, tokenizer and configuration, as transformers writes it."""
    path = tmp_path_factory.mktemp("base") / "model"
    transformers.AutoTokenizer.from_pretrained(tokenizer_files.write(path)).save_pretrained(path)
    (path / "tokenizer.model").unlink()
    settings = {
        **COMMON,
        "vocab_size": 400,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "max_position_embeddings": 128,
    }
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = transformers.Gemma3TextConfig(**settings, rope_parameters=rope)
    fill(transformers.Gemma3ForCausalLM(config)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "notes.jsonl"
    lines = tokenizer_files.TEXT
    path.write_text("\n".join(json.dumps({"prompt": line[:20], "response": line[20:]}) for line in lines))
    return path


def train(base, data, workdir, *more, through=call):
    command = [
        "train",
        f"--init_from={base}",
        f"--data={data}",
        "--lora_rank=8",
        "--epsilon=3",
        "--delta=1e-5",
        f"--workdir={workdir}",
    ]
    return through(
        *command, "--batch_size=32", "--max_batch_size=96", "--mesh=data:2", "--steps=4", "--sequence_length=48", *more
    )


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "adapters"
    done = train(base, data, workdir, through=run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("held-out ")
    return workdir


@pytest.mark.slow
def test_nothing_but_model_data_and_epsilon_need_be_said(base, data, tmp_path):
    """Rows fill the context, the batch is a quarter of the units, and what was chosen is told and kept."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line + "\n" for line in data.read_text().splitlines()[:80]))
    given = [f"--init_from={base}", f"--data={few}", "--epsilon=3", f"--workdir={tmp_path / 'run'}", "--steps=2"]
    done = call("train", *given)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["sequence_length"], config["dtype"]) == (128, "float32")
    assert config["batch_size"] == config["num_units"] // 4 and config["learning_rate"] <= 8e-3
    assert f"in rows of 128, with learning rate {config['learning_rate']:g} after 10 steps of warm-up" in done.stderr
    assert "(by the model's size: --sequence_length, --batch_size, --learning_rate" in done.stderr


@pytest.mark.slow
def test_two_processes_train_adapters_of_one_directory(base, data, tmp_path):
    outcomes = ended(train(base, data, tmp_path / "run", through=functools.partial(start_together, 2)))
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert run("audit", tmp_path / "run").returncode == 0


def greedy(directory, prompt, model=None):
    """What transformers' generate writes after the prompt."""
    model, tokenizer = model or load_torch(directory), transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_report_says_what_was_protected(trained):
    report = json.loads((trained / "report.json").read_text())
    assert report["privacy_unit"] == "example" and report["epsilon"] <= 3
    assert "one record of the training data, of which the first 48 tokens" in report["statement"]
    assert report["init_sha256"] in report["statement"] and "existing checkpoint" in report["statement"]
    # Rank 8 beside seven matrices in each of four layers: 32 -> 64, 32, 32; 64 -> 32; 32 -> 48 twice; 48 -> 32.
    assert report["trained_parameters"] == 4 * 8 * ((32 + 64) + 2 * (32 + 32) + (64 + 32) + 2 * (32 + 48) + (48 + 32))


@pytest.mark.slow
def test_from_a_directory_to_transformers_generate(base, trained, tmp_path):
    # Adapters alone, in PEFT's format.
    workdir = shutil.copytree(trained, tmp_path / "run")
    done = call("export", f"--workdir={workdir}", f"--out={tmp_path / 'adapters'}")
    assert done.returncode == 0, done.stderr
    adapters = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "adapters").eval()
    # The whole model.
    done = call("export", f"--workdir={workdir}", f"--out={tmp_path / 'merged'}", "--merge")
    assert done.returncode == 0, done.stderr
    merged = load_torch(tmp_path / "merged")
    ids = torch.tensor(np.random.default_rng(0).integers(8, 390, (2, 40)))
    with torch.no_grad():
        a, b, untrained = (model(ids).logits.numpy() for model in (adapters, merged, load_torch(base)))
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)
    assert np.abs(a - untrained).max() > 1e-3
    # Both write what the run's own model writes.
    ours = call(
        "sample", f"--workdir={workdir}", *(f"--prompt={p}" for p in PROMPTS), "--temperature=0", "--max_new_tokens=12"
    )
    assert ours.returncode == 0, ours.stderr
    for model in (merged, adapters):
        theirs = [p + greedy(tmp_path / "merged", p, model) for p in PROMPTS]
        assert ours.stdout.splitlines() == theirs
    directly = call(
        "sample",
        f"--init_from={tmp_path / 'merged'}",
        f"--prompt={PROMPTS[0]}",
        "--temperature=0",
        "--max_new_tokens=12",
    )
    assert directly.stdout.splitlines() == ours.stdout.splitlines()[:1]
    # The cards carry the report, the ledger knows every file, and an audit of the whole agrees.
    for name in ("adapters", "merged"):
        assert "differentially private with respect to one unit" in (tmp_path / name / "README.md").read_text()
    done = call("audit", workdir, f"--export={tmp_path / 'adapters'},{tmp_path / 'merged'}")
    assert done.returncode == 0, done.stdout
    weights = tmp_path / "adapters" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    done = call("audit", workdir, f"--export={tmp_path / 'adapters'}")
    assert done.returncode == 1 and "export_unknown in" in done.stdout


def test_a_resumed_run_is_the_uninterrupted_one(base, data, trained, tmp_path):
    # The base is read again; the adapters go on from the checkpoint.
    from tests.training.runs import final_parameters

    def adapters(workdir):
        return final_parameters(workdir)[1]

    workdir = shutil.copytree(trained, tmp_path / "run")
    done = train(base, data, workdir)
    assert done.returncode == 0, done.stderr
    assert json.dumps(jax_to_lists(adapters(workdir))) == json.dumps(jax_to_lists(adapters(trained)))


def jax_to_lists(tree):
    return {k: jax_to_lists(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree).tolist()


@pytest.mark.slow
def test_full_fine_tuning_exports_the_whole_model(base, data, tmp_path):
    workdir = tmp_path / "run"
    command = [
        "train",
        f"--init_from={base}",
        f"--data={data}",
        "--epsilon=3",
        f"--workdir={workdir}",
        "--batch_size=32",
        "--steps=2",
    ]
    done = call(*command, "--sequence_length=48")
    assert done.returncode == 0, done.stderr
    for dtype, bits in (("as_stored", 32), ("bfloat16", 16)):
        done = call("export", f"--workdir={workdir}", f"--out={tmp_path / dtype}", f"--dtype={dtype}")
        assert done.returncode == 0, done.stderr
        assert {tensor.dtype.itemsize * 8 for tensor in load_file(tmp_path / dtype / "model.safetensors").values()} == {
            bits
        }
    ours = call("sample", f"--workdir={workdir}", f"--prompt={PROMPTS[0]}", "--temperature=0", "--max_new_tokens=12")
    assert ours.stdout.splitlines() == [PROMPTS[0] + greedy(tmp_path / "as_stored", PROMPTS[0])]
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        p.name for p in (tmp_path / "as_stored").iterdir()
    }
    assert json.loads((workdir / "report.json").read_text())["trained_parameters"] == sum(
        tensor.size for tensor in load_file(base / "model.safetensors").values()
    )


@pytest.mark.slow
def test_chat_data_and_chat_prompts(base, tmp_path, monkeypatch):
    """Named by relative paths from one folder, the run is used from another; what is exported stops at a turn's end."""
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "who came back?"}, {"role": "assistant", "content": "the patient"}]
    path.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(200)))
    monkeypatch.chdir(base.parent)
    done = train(base.name, path, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == str(base)
    done = train(base, "chats.jsonl", "run", "--checkpoint_every=3")
    assert done.returncode == 0 and "held-out" in done.stdout, done.stderr
    done = call("export", "--workdir=run", "--out=whole", "--merge")
    assert done.returncode == 0, done.stderr
    ends = transformers.GenerationConfig.from_pretrained("whole").eos_token_id
    theirs = transformers.AutoTokenizer.from_pretrained("whole")
    assert ends == [1, theirs.convert_tokens_to_ids("<end_of_turn>")]
    assert theirs.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False).startswith("<bos><start")
    assert {path.stat().st_mode & 0o777 for path in pathlib.Path("whole").iterdir()} == {0o666 & ~umask()}
    chat = transformers.pipeline("text-generation", model="whole", device="cpu")
    answer = chat(turns[:1], max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert [turn["role"] for turn in answer] == ["user", "assistant"]
    done = call("export", "--workdir=run", "--out=adapters")
    assert done.returncode == 0, done.stderr
    named = json.loads(pathlib.Path("adapters/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base) and pathlib.Path("adapters/chat_template.jinja").is_file()
    done = call(
        "sample",
        f"--workdir={tmp_path / 'run'}",
        "--chat",
        "--prompt=who came back?",
        "--max_new_tokens=8",
        "--top_k=3",
    )
    assert done.returncode == 0 and "who came back?" not in done.stdout


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.slow
def test_a_name_of_the_hub_is_what_was_downloaded(base, data, tmp_path, monkeypatch):
    """Files as `hf download` leaves them; nothing is fetched."""
    monkeypatch.setitem(vars(huggingface_hub.constants), "HF_HUB_CACHE", str(tmp_path / "hub"))
    done = train("google/gemma-3-tiny", data, tmp_path / "run")
    assert done.returncode == 2 and "`hf download google/gemma-3-tiny` gets it" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    folder = tmp_path / "hub" / "models--google--gemma-3-tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, folder / "snapshots" / ("0" * 40))
    done = train("google/gemma-3-tiny", data, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == "google/gemma-3-tiny"
    done = call("export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'adapters'}")
    assert done.returncode == 0, done.stderr
    named = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "google/gemma-3-tiny"
    # As a tokenizer, and a file whose path looks like such a name.
    for name in ("google/gemma-3-tiny", "tokens/own.model"):
        (tmp_path / "tokens").mkdir(exist_ok=True)
        tokenizer_files.write(tmp_path / "written")
        shutil.copy(tmp_path / "written" / "tokenizer.model", tmp_path / "tokens" / "own.model")
        monkeypatch.chdir(tmp_path)
        done = train(base, data, tmp_path / name.replace("/", "_"), f"--tokenizer={name}", "--steps=1")
        assert done.returncode == 0, done.stderr
        done = call("sample", f"--workdir={tmp_path / name.replace('/', '_')}", "--prompt=the", "--max_new_tokens=2")
        assert done.returncode == 0, done.stderr


REFUSALS = {
    "no directory": (["--init_from=/nowhere"], "no Hugging Face directory"),
    "preset too": (["--init_from={base}", "--model=tiny"], "drop --model"),
    "adapters of nothing": (["--lora_rank=4"], "--init_from"),
    "scale of nothing": (["--init_from={base}", "--lora_alpha=4"], "--lora_rank"),
    "unknown layer": (["--init_from={base}", "--lora_rank=4", "--lora_targets=w_proj"], "q_proj,k_proj"),
    "rank zero": (["--init_from={base}", "--lora_rank=0"], "at least 1"),
    "rows too long": (["--init_from={base}", "--sequence_length=500"], "exceeds the 128 tokens"),
    "no tokenizer": (["--init_from={bare}", "--sequence_length=32"], "neither tokenizer.json nor tokenizer.model"),
    "tokenizer too large": (
        ["--init_from={bare}", "--sequence_length=32", "--tokenizer={base}"],
        "more than the model's 97",
    ),
    "targets of nothing": (["--init_from={base}", "--lora_targets=q_proj"], "--lora_rank"),
    "seed": (["--seed=4294967296"], "below 2^32"),
    "seed beyond every count": (["--seed=100000000000000000000"], "at most 1e+18"),
    "other unit": (["--init_from={base}", "--privacy_unit=sequence"], "--privacy_unit=example"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_one_sentence(name, base, data, tmp_path, capsys):
    from dpgemma import cli
    from tests.gemma.hf_models import directory

    arguments, message = REFUSALS[name]
    places = dict(base=base, bare=directory("gemma2"))
    flags = ["train", f"--data={data}", f"--workdir={tmp_path / 'run'}", *(a.format(**places) for a in arguments)]
    assert cli.main(flags) == 2
    err = capsys.readouterr().err.strip()
    assert message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_merged_weights_are_float32_throughout(base, data, tmp_path):
    # Published bases are bfloat16: a merged model that kept this type would round the adapters away.
    half = shutil.copytree(base, tmp_path / "half")
    tensors = {name: tensor.astype(bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    workdir = tmp_path / "run"
    done = train(half, data, workdir)
    assert done.returncode == 0, done.stderr
    done = call("export", f"--workdir={workdir}", "--merge", f"--out={tmp_path / 'merged'}")
    assert done.returncode == 0, done.stderr
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        np.dtype("float32")
    }
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    assert call("export", f"--workdir={workdir}", "--dtype=bfloat16", f"--out={tmp_path / 'x'}").returncode == 2


@pytest.mark.slow
def test_a_foreign_checkpoint_gets_no_privacy_card(base, data, trained, tmp_path):
    workdir, other = shutil.copytree(trained, tmp_path / "run"), tmp_path / "other"
    done = train(base, data, other)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(workdir / "checkpoints" / "4")
    shutil.copytree(other / "checkpoints" / "4", workdir / "checkpoints" / "4")
    done = call("export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "another ledger" in done.stderr and not (tmp_path / "out").exists()


def test_a_base_that_changed_or_moved_is_noticed(base, trained, data, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    workdir = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())

    def sample(*more):
        return call("sample", f"--workdir={workdir}", "--prompt=the", "--max_new_tokens=3", "--temperature=0", *more)

    expected = sample()
    # Where the base has gone, its new place is asked for, and only the very same one is taken.
    config_text = json.dumps({**config, "init_from": str(tmp_path / "gone"), "tokenizer": str(tmp_path / "gone")})
    (workdir / "config.json").write_text(config_text)
    done = sample()
    assert done.returncode == 2 and "say where with --init_from" in done.stderr
    assert sample(f"--init_from={moved}").stdout == expected.stdout
    path = moved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    done = sample(f"--init_from={moved}")
    assert done.returncode == 2 and "SHA-256 differs" in done.stderr
    done = call("export", f"--workdir={workdir}", f"--init_from={moved}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "SHA-256 differs" in done.stderr
    # A resumed run refuses a changed base as well.
    workdir = shutil.copytree(trained, tmp_path / "again")
    text = (base / "config.json").read_text()
    try:
        (base / "config.json").write_text(text + "\n")
        done = train(base, data, workdir)
    finally:
        (base / "config.json").write_text(text)
    assert done.returncode == 2 and "init_sha256" in done.stderr
