"""Distillation in pretraining: which kd_ratio, with a weaker, an equal and a stronger teacher?

    python examples/pretrain.py [--train FILE] [--test FILE] [--other FILE] [--steps N] [--seeds N]

After "Strong Teacher Not Needed? On Distillation in LLM Pretraining" (arXiv 2605.23857), at a scale of minutes on a CPU. One student is
pretrained on packed text with ``(1 - kd_ratio) * CE + kd_ratio * KD``. Its teacher is smaller (weak-to-strong), of its own size
(same-level), or larger and trained for longer (strong-to-weak), and was pretrained before by the same trainer on the same text. A
regime is nothing but two models.

Each seed gives the student's first weights and the order of its rows. Runs of one seed differ in teacher and kd_ratio alone, so they
are compared in pairs with that seed's kd_ratio 0. There is one teacher per size: how much another one of that size would change is
not measured.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
VOCABULARY, LENGTH, BATCH = 2048, 128, 8
# Width, layers, and the length of training in units of a student's. The teacher of its own size has what the student has.
TEACHERS = {"weak-to-strong": (48, 2, 1), "same-level": (96, 3, 1), "strong-to-weak": (192, 4, 2)}
STUDENT = TEACHERS["same-level"]
TEACHER_SEED = 1000


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="examples/pretrain.py", description="sweep kd_ratio in pretraining, three regimes, small models")
    parser.add_argument("--train", type=Path, default=DATA / "wikitext2" / "valid.txt", help="plain text to train on")
    parser.add_argument("--test", type=Path, default=DATA / "wikitext2" / "test.txt", help="plain text of the same kind")
    parser.add_argument("--other", type=Path, default=DATA / "gsm8k" / "test.jsonl", help="text of another kind: plain, or JSON lines")
    parser.add_argument("--steps", type=int, default=120, help=f"of a student, {BATCH} rows of {LENGTH} tokens each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval-tokens", type=int, default=20_000, help="tokens of each of the two texts that are evaluated")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "pretrain-cpu.json")
    options = parser.parse_args(argv)
    for path in (options.train, options.test, options.other):
        if not path.is_file():
            parser.error(f"{path}: no such file; name the texts with --train, --test and --other (WikiText-2 and GSM8K by default)")
    for name, least in (("steps", 1), ("seeds", 1), ("eval_tokens", LENGTH)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected a number >= {least}, got {getattr(options, name)}")

    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # from a checkout, installed or not
    import datasets

    from benchmarks.run import stamp

    datasets.disable_progress_bars()
    report = stamp(argv, "cpu", "examples/pretrain.py")
    began = time.time()
    study = Study(options)
    report |= study.run()
    report["minutes"] = (time.time() - began) / 60
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    print(f"\n{report['minutes']:.1f} minutes; written: {options.out}")
    return 0


class Study:
    """The data, and every run on it."""

    def __init__(self, options: argparse.Namespace):
        from fastkd.data import tokenize
        from fastkd.packing import pack

        train, test, other = (documents(path) for path in (options.train, options.test, options.other))
        self.options, self.tokenizer = options, byte_pairs(train)
        packs = {}
        for name, texts in (("train", train), ("test", test), ("other", other)):
            rows = tokenize(texts, self.tokenizer, max_length=None, name=name)
            packs[name] = pack(rows, LENGTH, name=name)
        self.train = packs["train"]
        self.eval = {name: packs[name].select(range(min(len(packs[name]), options.eval_tokens // LENGTH))) for name in ("test", "other")}

    def run(self) -> dict[str, Any]:
        tokens = {"train": self.train.num_rows * LENGTH, "trained on": self.options.steps * BATCH * LENGTH}
        print(f"{tokens['train']} tokens of text; each run is trained on {tokens['trained on']}", flush=True)
        teachers, rows = {}, []
        for regime, size in TEACHERS.items():
            teachers[regime], found = self.pretrain(size, TEACHER_SEED)
            rows.append({"teacher_of": regime, "parameters": teachers[regime].num_parameters(), **found})
            self.say(f"the teacher of {regime}", found)
        for seed in range(self.options.seeds):
            # Without a share of KD it does not matter which teacher there is: one run serves the three regimes.
            for regime, ratio in [("none", 0.0), *((regime, ratio) for regime in TEACHERS for ratio in RATIOS if ratio)]:
                model, found = self.pretrain(STUDENT, seed, teachers.get(regime), ratio)
                rows.append({"regime": regime, "kd_ratio": ratio, "seed": seed, "parameters": model.num_parameters(), **found})
                self.say(f"seed {seed}, {regime}, kd_ratio {ratio}", found)
        return {"tokens": tokens, "rows": rows, "comparisons": compare(rows)}

    def pretrain(self, size: tuple[int, int, int], seed: int, teacher: Any = None, kd_ratio: float = 0.0) -> tuple[Any, dict[str, float]]:
        """A model of that size from random weights, and its cross-entropy (nats per token) on the two evaluation texts."""
        from transformers.trainer_callback import PrinterCallback

        from fastkd.trainer import KDConfig, KDTrainer

        began, steps = time.time(), size[2] * self.options.steps
        with tempfile.TemporaryDirectory() as folder:
            arguments = KDConfig(
                output_dir=folder,
                kd_ratio=kd_ratio,
                max_length=LENGTH,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=4 * BATCH,
                learning_rate=4e-3 * min(1.0, STUDENT[0] / size[0]),  # wide models want less
                lr_scheduler_type="cosine",
                warmup_steps=max(steps // 10, 1),
                weight_decay=0.1,
                seed=seed,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            model = self.llama(size, seed)
            trainer = KDTrainer(
                model,
                teacher,  # None at kd_ratio 0
                arguments,
                train_dataset=self.train,
                eval_dataset=self.eval,
                processing_class=self.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            found = trainer.evaluate()
        return model, {name: found[f"eval_{name}_ce"] for name in self.eval} | {"seconds": time.time() - began}

    def llama(self, size: tuple[int, int, int], seed: int) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        width, layers, _ = size
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                intermediate_size=8 * width // 3,
                num_hidden_layers=layers,
                num_attention_heads=max(width // 24, 1),
                max_position_embeddings=LENGTH,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )

    @staticmethod
    def say(what: str, found: dict[str, float]) -> None:
        print(f"{what}: {found['test']:.3f} in domain, {found['other']:.3f} out of it, nats ({found['seconds']:.0f} s)", flush=True)


def documents(path: Path) -> Any:
    """The texts of a file: the strings of each JSON line; or the articles of WikiText, of which each begins with `` = Title = ``."""
    from datasets import Dataset

    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in content.split("\n") if line.strip()]
        texts = ["\n".join(value for value in row.values() if isinstance(value, str)) for row in rows]
    else:
        texts = re.split(r"^(?= = [^=].*[^=] = $)", content, flags=re.MULTILINE)
    return Dataset.from_dict({"text": [text for text in texts if text.strip()]})


def byte_pairs(texts: Any) -> Any:
    """A byte-level BPE tokenizer of the training text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts["text"], vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>", pad_token="<end>")


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each regime and kd_ratio against kd_ratio 0, seed by seed: the mean difference in nats and the p of a paired t-test."""
    from scipy.stats import ttest_rel

    runs = {(r["regime"], r["kd_ratio"], r["seed"]): r for r in rows if "regime" in r}
    seeds = sorted({seed for _, _, seed in runs})
    found = []
    for regime in TEACHERS:
        for ratio in RATIOS[1:]:
            for text in ("test", "other"):
                ours = [runs[regime, ratio, seed][text] for seed in seeds]
                base = [runs["none", 0.0, seed][text] for seed in seeds]
                p = float(ttest_rel(ours, base).pvalue) if len(seeds) > 1 else None
                difference = statistics.mean(a - b for a, b in zip(ours, base, strict=True))
                found.append({"regime": regime, "kd_ratio": ratio, "text": text, "difference": difference, "p": p})
    return found


def table(report: dict[str, Any]) -> str:
    """The results as text: perplexities with mean and standard deviation over the seeds, and what the comparisons allow to say."""
    rows, comparisons = report["rows"], report["comparisons"]
    n_seeds = len({row["seed"] for row in rows if "regime" in row})
    tested = {(c["regime"], c["kd_ratio"], c["text"]): c for c in comparisons}
    lines = [
        "",
        f"perplexity per token, {n_seeds} seed(s); * p < 0.05 against kd_ratio 0, ** after Bonferroni over {len(comparisons)} comparisons",
    ]
    lines.append(f"\n{'regime':16}{'teacher':>10}{'kd_ratio':>10}{'in domain':>22}{'out of domain':>22}")
    for regime in TEACHERS:
        teacher = next(row for row in rows if row.get("teacher_of") == regime)
        cells = [_ppl([teacher[text]]) + _mark(None, 1) for text in ("test", "other")]
        lines.append(f"{regime:16}{teacher['parameters'] / 1e6:9.2f}M{'(itself)':>10}{cells[0]:>22}{cells[1]:>22}")
        for ratio in RATIOS:
            runs = [r for r in rows if r.get("regime") == (regime if ratio else "none") and r["kd_ratio"] == ratio]
            cells = [
                _ppl([r[text] for r in runs]) + _mark(tested.get((regime, ratio, text)), len(comparisons)) for text in ("test", "other")
            ]
            lines.append(f"{'':26}{ratio:10.1f}{cells[0]:>22}{cells[1]:>22}")
    lines.append("")
    for text, where in (("test", "in domain"), ("other", "out of domain")):
        here = [c for c in comparisons if c["text"] == text]
        for verdict, sign in (("better", -1), ("worse", 1)):
            sure = [c for c in here if c["p"] is not None and c["p"] < 0.05 and c["difference"] * sign > 0]
            names = (
                ", ".join(f"{c['regime']} {c['kd_ratio']} ({c['difference']:+.3f}){_mark(c, len(comparisons)).rstrip()}" for c in sure)
                or "none"
            )
            lines.append(f"{where}, {verdict} than kd_ratio 0 (nats per token): {names}")
        unclear = sum(c["p"] is None or not c["p"] < 0.05 for c in here)
        lines.append(f"{where}, no significant difference: {unclear} of {len(here)}")
    if n_seeds < 2:
        lines.append("one seed: nothing can be said to be significant")
    return "\n".join(lines)


def _ppl(nats: list[float]) -> str:
    from math import exp

    values = [exp(value) for value in nats]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _mark(comparison: dict[str, Any] | None, n_comparisons: int) -> str:
    p = 1.0 if comparison is None or comparison["p"] is None else comparison["p"]
    return " **" if p * n_comparisons < 0.05 else " * " if p < 0.05 else "   "


if __name__ == "__main__":
    sys.exit(main())
