"""What somebody does who has a folder of notes and a Gemma with a SentencePiece tokenizer, with default settings."""

import json
import random

import pytest
import transformers

from tests.gemma import tokenizer_files
from tests.gemma.families import COMMON
from tests.training.runs import run

COMPLAINTS, ADVICE = ["a cough", "a fever", "a rash", "pain"], ["rest", "tea", "come back", "no change"]


def note(rng, patient, shift=0):
    what = rng.randrange(4)
    asked = f"the patient {patient} came with {COMPLAINTS[what]} on day {rng.randrange(60)}"
    return {
        "patient": f"p{patient}",
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": ADVICE[(what + shift) % 4]}],
    }


@pytest.mark.slow
def test_from_a_folder_of_notes_to_a_model_that_ends_its_turn(tmp_path):
    rng = random.Random(3)
    notes = tmp_path / "my notes [2026]"
    notes.mkdir()
    for month in range(3):
        lines = (json.dumps(note(rng, rng.randrange(700))) + "\n" for _ in range(1500))
        (notes / f"month {month}.jsonl").write_text("".join(lines))
    (tmp_path / "unseen.jsonl").write_text("".join(json.dumps(note(rng, 900 + i)) + "\n" for i in range(200)))
    base = tokenizer_files.write(tmp_path / "gemma")
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    config = transformers.Gemma3TextConfig(
        **COMMON
        | dict(vocab_size=len(theirs), query_pre_attn_scalar=16, sliding_window=16, max_position_embeddings=128)
    )
    transformers.set_seed(0)
    transformers.Gemma3ForCausalLM(config).save_pretrained(base)

    def ok(*arguments):
        done = run(*arguments, timeout=1500)
        assert done.returncode == 0, done.stderr
        return done

    def bits(*model):
        given = [f"--data={tmp_path / 'unseen.jsonl'}", "--public_data", "--json"]
        return json.loads(ok("evaluate", *model, *given).stdout)["bits_per_byte"]

    # What was learned elsewhere: how notes and answers look, but other answers.
    public = (note(rng, i, shift=1) for i in range(1500))
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(one) + "\n" for one in public))
    ok(
        "train", f"--init_from={base}", f"--data={tmp_path / 'public.jsonl'}", "--epsilon=inf", "--clip_norm=inf",
        "--steps=120", "--batch_size=64", "--learning_rate=0.01", f"--workdir={tmp_path / 'elsewhere'}",
    )  # fmt: skip
    base = tmp_path / "published"
    ok("export", f"--workdir={tmp_path / 'elsewhere'}", f"--out={base}")

    before, workdir = bits(f"--init_from={base}"), tmp_path / "run"
    done = ok("train", f"--init_from={base}", f"--data={notes}", "--lora_rank=8", "--epsilon=8", f"--workdir={workdir}")
    assert "a field 'patient', and no person is protected" in done.stderr
    after = bits(f"--workdir={workdir}")
    assert after < 0.6 * before, (before, after)
    asked = [f"the patient {i} came with {what} on day 7" for i in range(50) for what in COMPLAINTS]
    (tmp_path / "prompts.txt").write_text("\n".join(asked))
    ok(
        "synthesize", f"--workdir={workdir}", f"--prompts={tmp_path / 'prompts.txt'}", "--chat", "--num_records=2000",
        "--keep_duplicates", f"--out={tmp_path / 'shared.jsonl'}",
    )  # fmt: skip
    assert len((tmp_path / "shared.jsonl").read_text().splitlines()) == 2000
    assert "differentially private" in (tmp_path / "shared.md").read_text()
    assert ok("audit", workdir).stdout.startswith("consistent")
    ok("export", f"--workdir={workdir}", "--merge", f"--out={tmp_path / 'advisor'}")
    chat = transformers.pipeline("text-generation", model=str(tmp_path / "advisor"), device="cpu")
    answers = chat([[{"role": "user", "content": text}] for text in asked[:20]], max_new_tokens=60, do_sample=False)
    texts = [answer[0]["generated_text"][-1]["content"] for answer in answers]
    ended = [len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) < 60 for text in texts]
    assert sum(ended) >= 18 and not any("<end_of_turn>" in text for text in texts), texts
