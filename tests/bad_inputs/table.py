"""The table: what is given, and the one line that it must be answered with.

The folder in which the commands run has ``run.yaml``, ``train.jsonl``, ``eval.jsonl`` and the models ``teacher`` (4 layers), ``other``
(the same size, another vocabulary), ``short`` (with 8 learned positions), ``begun`` (a run with a checkpoint), ``scores.parquet`` and
``store`` (of other data, of another teacher).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MINIMAL = "student: teacher\nteacher: teacher\ndata: {train: train.jsonl}\n"


@dataclass(frozen=True)
class Row:
    """One mistake.

    Attributes:
        words: of the command line.
        key: where in the file, or which flag; empty where the file itself is at fault.
        remedy: words of the line that say what is expected, or what to do.
        file: what the line blames.
        files: what is written before, by name.
        make: what else is done before, in the folder.
        loads: the student is loaded before it shows.
        lacks: a package whose absence is the mistake.
    """

    name: str
    words: tuple[str, ...]
    key: str
    remedy: str
    file: str = "run.yaml"
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    make: Callable[[Path], None] | None = None
    loads: bool = False
    lacks: str = ""


def text(name: str, content: str | bytes, key: str, remedy: str) -> Row:
    """A configuration file of its own."""
    return Row(name, ("distill", "mine.yaml"), key, remedy, "mine.yaml", {"mine.yaml": content})


def over(name: str, override: str | tuple[str, ...], key: str, remedy: str, command: str = "distill", **more) -> Row:
    """``run.yaml`` with overrides."""
    return Row(name, (command, "run.yaml", *([override] if isinstance(override, str) else override)), key, remedy, **more)


def data(
    name: str, content: str | bytes, remedy: str, file: str = "mine.jsonl", more: tuple[str, ...] = (), key: str = "data.train"
) -> Row:
    """A file of rows."""
    return Row(name, ("distill", "run.yaml", f"data.train={file}", *more), key, remedy, files={file: content})


def flags(name: str, words: str, key: str, remedy: str, file: str = "", **more) -> Row:
    return Row(name, tuple(words.split()), key, remedy, file, **more)


def _teacher(name: str, *without: str, config: str | None = None) -> Callable[[Path], None]:
    """A copy of the teacher without some of its files, or with another config."""

    def make(place: Path) -> None:
        (place / name).mkdir()
        for file in (place / "teacher").iterdir():
            if file.name not in without:
                (place / name / file.name).write_bytes(file.read_bytes())
        if config is not None:
            (place / name / "config.json").write_text(config)

    return make


def _torn(place: Path) -> None:
    """A run with a checkpoint, and a plan that is not whole."""
    (place / "torn" / "checkpoint-2").mkdir(parents=True)
    (place / "torn" / "plan.json").write_text("{")


TABLE = [
    # The file itself.
    Row("no such file", ("distill", "missing.yaml"), "", "`fastkd init` writes", "missing.yaml"),
    Row("a folder as the file", ("distill", "teacher"), "", "expected a YAML file", "teacher"),
    text("an empty file", "", "", "expected keys and values such as"),
    text("a list", "- student\n- teacher\n", "", "expected keys and values such as"),
    text("plain words", "distil my model", "", "expected keys and values such as"),
    text("not UTF-8", b"student: caf\xe9\n", "", "save it as UTF-8"),
    text("UTF-16", MINIMAL.encode("utf-16"), "", "save it as UTF-8"),
    text("a tab for indentation", "student: teacher\ndata:\n\ttrain: train.jsonl\n", "line 3", "indent with spaces"),
    text("a bracket left open", MINIMAL + "loss: {temperature: 2\n", "line 5", "expected ',' or '}'"),
    text("a quote left open", "student: 'teacher\n", "line 2", "close the quote"),
    text("a colon in a value", "student: a: b\n", "line 1", "quote a value that holds a colon"),
    text("a key twice", MINIMAL + "seed: 1\nseed: 2\n", "line 5", "'seed' is there twice; remove one of the two"),
    text(
        "a key twice within a section",
        MINIMAL + "loss: {kd_ratio: 1, kd_ratio: 0.5}\n",
        "line 4",
        "'kd_ratio' is there twice; remove one of the two",
    ),
    text("a tag of Python's", MINIMAL + "seed: !!python/name:os.system\n", "line 4", "write a plain value"),
    text("an alias of nothing", "student: *m\n", "line 1", "quote a value that begins with *"),
    text("a date that is none", MINIMAL + "seed: 2024-13-45\n", "", "quote what looks like a date"),
    text("two documents", MINIMAL + "---\nseed: 1\n", "line 4", "expected one document; remove the line ---"),
    # Keys.
    text("an unknown key", MINIMAL + "sead: 1\n", "sead", "did you mean 'seed'"),
    text("an unknown key that is near none", MINIMAL + "qqq: 1\n", "qqq", "known: student, teacher"),
    text("a number as a key", MINIMAL + "3: 1\n", "3", "known: student"),
    over("an unknown key of a model", "student={modle: teacher}", "student.modle", "did you mean 'model'"),
    over("an unknown key of the data", "data.evaluation=eval.jsonl", "data.evaluation", "did you mean 'eval'"),
    over("an unknown key of a data set", "data.train={path: a/b, splt: train}", "data.train.splt", "did you mean 'split'"),
    over("an unknown column", "data.columns={promt: q}", "data.columns.promt", "did you mean 'prompt'"),
    over("an unknown key of the loss", "loss.temprature=2", "loss.temprature", "did you mean 'temperature'"),
    over("an unknown field of training", "training.learning_rat=1", "training.learning_rat", "did you mean 'learning_rate'"),
    over("an unknown key of the store", "store={kind: hidden, colour: 3}", "store.colour", "known: kind, path"),
    over("an unknown key of difficulty", "difficulty={signl: loss}", "difficulty.signl", "did you mean 'signal'"),
    over("an unknown option of a preset", "plan={preset: pocl, epoch: 2}", "plan.epoch", "did you mean 'epochs'"),
    over("an unknown key of a stage", "plan={stages: [{step: 2}]}", "plan.stages[0].step", "did you mean 'steps'"),
    over(
        "an unknown key of a ramp",
        "plan={stages: [{steps: 2, temperature: {from: 1, too: 2}}]}",
        "plan.stages[0].temperature.too",
        "did you mean 'to'",
    ),
    over("a field of LoRA that is unknown", "student={model: teacher, lora: {rank: 8}}", "student.lora.rank", "did you mean 'r'"),
    over("LoRA of a teacher", "teacher={model: teacher, lora: true}", "teacher.lora", "known: model"),
    over("a key that is not built yet", "loss.lmbda=0.5", "loss.lmbda", "remove the key"),
    # Both, or neither.
    over("teacher and teachers", "teachers={a: teacher}", "teachers", "keep one of the two"),
    over("no student", "student=null", "student", "give a model's name or path"),
    over("no teacher", "teacher=null", "teacher", "give a model's name or path"),
    over("no data", "data=null", "data", "give {train: FILE}"),
    over("no rows to train on", "data={eval: eval.jsonl}", "data.train", "give a file or a data set's name"),
    over("from and model", "student={from: teacher, model: teacher, layers: [0]}", "student", "keep one of the two"),
    over("from without layers", "student={from: teacher}", "student.layers", "list the layers to keep"),
    over("a column and a signal", "difficulty={signal: loss, column: level}", "difficulty.column", "keep one of the two"),
    over("a preset and stages", "plan={preset: kd, stages: [{}]}", "plan.stages", "keep one of the two"),
    over("steps and epochs", "plan={stages: [{steps: 1, epochs: 1}]}", "plan.stages[0].steps", "keep one of the two"),
    over(
        "two bounds of the loss's memory",
        ("loss.chunk_tokens=8", "loss.max_loss_buffer_mb=1"),
        "loss.max_loss_buffer_mb",
        "keep one of the two",
    ),
    over("packing and padding_free", ("data.packing=true", "data.padding_free=true"), "data.padding_free", "expected one of the two"),
    over("a batch size said twice", "training.auto_find_batch_size=true", "training.auto_find_batch_size", "must be left off"),
    over("a seed in training", "training.seed=1", "training.seed", "write seed: ... there"),
    over("the folder in training", "training.output_dir=a", "training.output_dir", "write output_dir: ... there"),
    over("packing in training", "training.packing=true", "training.packing", "write data: {packing: ...}"),
    over("a temperature that the plan says", ("plan=pocl", "loss={temperature: 2}"), "loss.temperature", "leave it out here"),
    over(
        "epochs that the plan says",
        ("plan=pocl", "loss={}", "training.num_train_epochs=2"),
        "training.num_train_epochs",
        "leave it out here",
    ),
    # Types.
    over("a word for a number", "loss.temperature=hot", "loss.temperature", "expected a number in (0, inf)"),
    over("a quoted number", "loss.temperature='2'", "loss.temperature", "expected a number in (0, inf)"),
    over("true for a number", "loss.kd_ratio=true", "loss.kd_ratio", "expected a number in [0, 1]"),
    over("a list for a mapping", "loss=[1]", "loss", "expected a mapping"),
    over("a word for a mapping", "data=train.jsonl", "data", "expected a mapping with the keys train"),
    over("a number for a path", "output_dir=3", "output_dir", "expected a string"),
    over("a number for a model", "student=3", "student", "expected a model's name or path"),
    over("a fraction for a whole number", "training.max_steps=1.5", "training.max_steps", "expected a whole number"),
    over("one for true", "training.bf16=1", "training.bf16", "expected true or false"),
    over("null for a field that has none", "training.learning_rate=null", "training.learning_rate", "expected a number"),
    over("a list of words as layers", "student.layers=[zero]", "student.layers", "expected a list of different layer numbers"),
    over("a plan that is a number", "plan=3", "plan", "expected a preset's name"),
    over("stages that are no list", "plan={stages: 3}", "plan.stages", "expected a list"),
    # Outside the domain.
    over("a temperature of 0", "loss.temperature=0", "loss.temperature", "expected a number in (0, inf)"),
    over("a temperature that is not a number", "loss.temperature=.nan", "loss.temperature", "expected a number in (0, inf)"),
    over("an infinite temperature", "loss.temperature=.inf", "loss.temperature", "expected a number in (0, inf)"),
    over("a share above 1", "loss.kd_ratio=1.1", "loss.kd_ratio", "expected a number in [0, 1]"),
    over("a negative share", "loss.kd_ratio=-0.1", "loss.kd_ratio", "expected a number in [0, 1]"),
    over("a learning rate that is not a number", "training.learning_rate=.nan", "training.learning_rate", "expected a number"),
    over("a negative learning rate", "training.learning_rate=-1", "training.learning_rate", "expected a finite number >= 0"),
    over("a negative weight decay", "training.weight_decay=-1", "training.weight_decay", "expected a finite number >= 0"),
    over("batches of none", "training.per_device_train_batch_size=0", "training.per_device_train_batch_size", "expected a number >= 1"),
    over("negative steps to save at", "training.save_steps=-1", "training.save_steps", "expected a number > 0"),
    over("rows of one token", "data.max_length=1", "data.max_length", "expected a whole number >= 2"),
    over("a negative seed", "seed=-1", "seed", "expected a whole number in [0"),
    over("a chunk of none", "loss.chunk_tokens=0", "loss.chunk_tokens", "expected a whole number >= 1"),
    over("a buffer of none", "loss.max_loss_buffer_mb=0", "loss.max_loss_buffer_mb", "expected a number in (0, inf)"),
    over("a store without room", "store={max_gb: 0}", "store.max_gb", "expected a number in (0, inf)"),
    over("a layer twice", "student.layers=[0, 0]", "student.layers", "expected a list of different layer numbers"),
    over(
        "epochs of a negative number",
        "training={num_train_epochs: -1, use_cpu: true}",
        "training.num_train_epochs",
        "expected a number > 0",
    ),
    # Names.
    over("an unknown divergence", "loss={divergence: foward_kl}", "loss.divergence", "did you mean 'forward_kl'"),
    over("a parameter of another divergence", "loss={beta: 0.1}", "loss.beta", "it is one of jsd"),
    over("a parameter outside its domain", "loss={divergence: jsd, beta: 1.5}", "loss.beta", "expected a number in [0, 1]"),
    over("an unknown preset", "plan=pockl", "plan", "did you mean 'pocl'"),
    over("an unknown signal", "difficulty={signal: los}", "difficulty.signal", "did you mean 'loss'"),
    over("an unknown kind of store", "store={kind: hiden}", "store.kind", "did you mean 'hidden'"),
    over("an unknown dtype", "student={model: teacher, dtype: float33}", "student.dtype", "did you mean 'float32'"),
    over("an unknown quantisation", "teacher={model: teacher, quantization: 3bit}", "teacher.quantization", "expected one of 8bit, 4bit"),
    over("an unknown optimizer", "training.optim=adamw_torchh", "training.optim", "did you mean 'adamw_torch'"),
    over("an unknown schedule", "training.lr_scheduler_type=cosin", "training.lr_scheduler_type", "did you mean 'cosine'"),
    over("an unknown strategy", "training.eval_strategy=step", "training.eval_strategy", "expected one of no, steps, epoch"),
    over("an unknown tracker", "training.report_to=tensorbord", "training.report_to", "are supported; expected one of these, or none"),
    over("an unknown device", "teacher={model: teacher, device: gpu}", "teacher.device", "expected a device that is here"),
    over(
        "an unknown attention",
        "student={model: teacher, attn_implementation: flash}",
        "student.attn_implementation",
        "only possible arguments",
    ),
    # Overrides.
    over("an override without a value", "seed", "override 'seed'", "expected key.path=value"),
    over("an override without a key", "=3", "override '=3'", "expected key.path=value"),
    over("an override that is not YAML", "seed=[1", "override 'seed=[1'", "quote it"),
    over("an override below a name", "teacher.dtype=float32", "override 'teacher.dtype=float32'", "write 'teacher={...}'"),
    over("an override of a flag's kind", "--seed=1", "--seed=1", "see fastkd --help", file=""),
    # Data.
    over("no such data", "data.train=nowhere.jsonl", "data.train", "nowhere.jsonl: no such file (current directory: "),
    over("no such data to evaluate on", "data.eval=nowhere.jsonl", "data.eval", "nowhere.jsonl: no such file (current directory: "),
    over("a data set that is nowhere", "data.train=no/such-set", "data.train", "neither a file nor a data set"),
    over("a folder as data", "data.train=./teacher", "data.train", "expected a .json, .jsonl or .parquet file"),
    data("data in another format", "prompt,completion\na,b\n", "expected a .json, .jsonl or .parquet file", "mine.csv"),
    data("no rows", "", "the data set has no rows"),
    data("no rows in a list", "[]", "the data set has no rows", "mine.json"),
    data("a broken line", '{"prompt": "one", "completion": "two"}\n{"prompt": \n', "mine.jsonl: line 2: broken JSON"),
    data("a broken list", '[{"prompt": "one"', "line 1: broken JSON", "mine.json"),
    data("a line that is no object", '{"prompt": "one", "completion": "two"}\n3\n', "line 2: expected a JSON object"),
    data("one object", '{\n"prompt": "one",\n"completion": "two"\n}\n', "expected a list of objects, or one object per line"),
    data("rows not in UTF-8", b'{"prompt": "caf\xe9", "completion": "two"}\n', "not a readable UTF-8 file"),
    data("a broken Parquet file", b"PAR1 nothing", "not a readable Parquet file", "mine.parquet"),
    data("columns of no shape", '{"question": "one", "answer": "two"}\n', "Rename them"),
    data("a number for a text", '{"prompt": "one", "completion": 2}\n', "completion: expected a string, got int 2"),
    data("a column of mixed types", '{"prompt": "one", "completion": "two"}\n{"prompt": 1, "completion": "two"}\n', "its values mix types"),
    data("nothing to learn", '{"prompt": "one", "completion": ""}\n', "no row has a token to train on"),
    data("a message without a role", '{"messages": [{"content": "one"}]}\n', "expected {role, content}"),
    data("messages without a template", '{"messages": [{"role": "user", "content": "one"}]}\n', "no chat template"),
    data("token ids beyond the vocabulary", '{"input_ids": [1, 2, 999]}\n', "expected ids in [0, "),
    data("labels that are shifted", '{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}\n', "labels are not shifted"),
    data("a completion of plain text", '{"text": "one"}\n', "have no completion", more=("data.completion_only_loss=true",)),
    over("columns the wrong way round", "data.columns={question: prompt}", "data.columns", "expected {our name: the file's name}"),
    over("a column that is not there", "data.columns={prompt: question}", "data.columns", "no column 'question'; the data set has"),
    over("a name for a file", "data.train={path: train.jsonl, split: train}", "data.train", "they are for data sets on the hub"),
    over("nothing to evaluate on", ("data.eval=null", "training.eval_strategy=epoch"), "training.eval_strategy", "name data.eval"),
    # Plans.
    over("fractions that do not sum to 1", "plan={fractions: [0.5, 0.4], stages: [{steps: 1}]}", "plan.fractions", "that sum to 1"),
    over(
        "a bucket that is not there",
        "plan={fractions: [0.5, 0.5], stages: [{steps: 1, buckets: [2]}]}",
        "plan.stages[0].buckets",
        "there are buckets 0 to 1",
    ),
    over("a stage of no steps", "plan={stages: [{steps: 0}]}", "plan.stages[0].steps", "expected a whole number > 0"),
    over("no stages", "plan={stages: []}", "plan.stages", "expected at least one"),
    over(
        "a ramp of another shape",
        "plan={stages: [{steps: 2, temperature: {from: 1, to: 2, shape: wavy}}]}",
        "plan.stages[0].temperature.shape",
        "expected one of",
    ),
    over("a ramp without an end", "plan={stages: [{steps: 2, temperature: {from: 1}}]}", "plan.stages[0].temperature", "a ramp such as"),
    over("a stage's temperature of 0", "plan={stages: [{steps: 2, temperature: 0}]}", "plan.stages[0].temperature", "expected numbers > 0"),
    over(
        "a stage's unknown parameter",
        "plan={stages: [{steps: 2, parameters: {gamma: 1}}]}",
        "plan.stages[0].parameters.gamma",
        "it takes none",
    ),
    over("a teacher that is not there", "plan={stages: [{steps: 2, teacher: strong}]}", "plan.stages[0].teacher", "there are teacher"),
    over("more teachers than there are", "plan={stages: [{steps: 2, teacher: 1}]}", "plan.stages[0].teacher", "give more teachers"),
    over("more buckets than samples", ("plan={preset: pocl, buckets: 40}", "loss={}"), "plan.stages[0]", "fewer buckets"),
    over("an order that is unknown", "plan={order: random, stages: [{steps: 2}]}", "plan.order", "expected one of"),
    over(
        "a stage without a teacher that asks one",
        "plan={stages: [{steps: 2, teacher: null, kd_ratio: 0.5}]}",
        "plan.stages[0].kd_ratio",
        "needs 0",
    ),
    # Teachers and students.
    over(
        "several teachers without a plan",
        ("teacher=null", "teachers={a: teacher, b: teacher}", "student=teacher"),
        "teachers",
        "write plan: progressive",
    ),
    over("an unknown teacher to cut", "student.from=techer", "student.from", "did you mean 'teacher'"),
    over(
        "which of the teachers",
        ("teacher=null", "teachers={a: teacher, b: teacher}", "plan=progressive"),
        "student.from",
        "name one of a, b",
    ),
    over("a teacher without a name", ("teacher=null", "teachers=[teacher]"), "teachers", "expected a mapping of names to models"),
    over("a layer that is not there", "student.layers=[0, 9]", "student.layers", "expected indices from 0 to 3"),
    over(
        "a teacher's layer that is not there",
        ("student=second", "teacher={model: teacher, layers: [0, 9]}"),
        "teacher.layers",
        "expected indices from 0 to 3",
    ),
    over("no such student", "student=./nowhere", "student", "no such file or folder"),
    over("no such teacher", ("teacher=./nowhere", "student=teacher"), "teacher", "no such file or folder"),
    over("a name that the hub has not", "student=teachr", "student", "no such folder here, and the hub did not give it"),
    over("a folder without a model", "student=empty", "student", "expected tokenizer.json", make=lambda place: (place / "empty").mkdir()),
    over("a broken config", "student=half", "student", "is not a valid JSON file", make=_teacher("half", config="{")),
    over("a config of no model", "student=half", "student", "Should have a `model_type` key", make=_teacher("half", config="{}")),
    over(
        "a folder without weights",
        ("student=teacher", "teacher=bare"),
        "teacher",
        "no model.safetensors or pytorch_model.bin in",
        make=_teacher("bare", "model.safetensors"),
    ),
    over(
        "a folder without a tokenizer",
        "student=bare",
        "student",
        "expected tokenizer.json",
        make=_teacher("bare", "tokenizer.json", "tokenizer_config.json"),
    ),
    over("a torn GGUF file", "student=mine.gguf", "student", "is it whole?", files={"mine.gguf": b"GGUF\x03\x00\x00\x00"}),
    over("a GGUF file that is none", "student=mine.gguf", "student", "is not a GGUF file", files={"mine.gguf": b"nothing"}),
    over("a GGUF file that is not there", "student={model: teacher, gguf_file: a.gguf}", "student", "no file 'a.gguf' in 'teacher'"),
    over("another vocabulary", ("student=teacher", "teacher=other"), "teacher", "expected one vocabulary"),
    over("too few positions", ("student=short", "teacher=teacher"), "data.max_length", "has 8 positions"),
    over(
        "a quantised student without an adapter",
        "student={model: teacher, quantization: 4bit}",
        "student.quantization",
        "add lora: true beside it",
    ),
    over(
        "a quantisation without a package",
        "teacher={model: teacher, quantization: 4bit}",
        "teacher.quantization",
        "pip install",
        lacks="bitsandbytes",
    ),
    over(
        "an adapter on layers that are not there",
        "student={model: teacher, lora: {target_modules: [zzz]}}",
        "student.lora",
        "check the target modules",
    ),
    # Training.
    over(
        "an optimizer without its package",
        "training.optim=paged_adamw_8bit",
        "training.optim",
        "pip install bitsandbytes",
        lacks="bitsandbytes",
    ),
    over(
        "a tracker without its package",
        "training.report_to=wandb",
        "training.report_to",
        "to be installed; pip install wandb, or leave it out",
        lacks="wandb",
    ),
    over("16 bits where there are none", ("training.fp16=true", "training.use_cpu=true"), "training.fp16", "expected bf16"),
    over("two precisions", ("training.fp16=true", "training.bf16=true"), "training", "At most one of"),
    over("a best of no evaluation", "training.load_best_model_at_end=true", "training", "save and eval strategy to match"),
    over(
        "a best by an unknown metric", "training.metric_for_best_model=bleu", "training.metric_for_best_model", "expected one of loss, ce"
    ),
    over(
        "a filter that would hide infinities", "training.logging_nan_inf_filter=true", "training.logging_nan_inf_filter", "must be left off"
    ),
    over("label smoothing", "training.label_smoothing_factor=0.1", "training.label_smoothing_factor", "must be left off"),
    over("resume as a field", "training.resume_from_checkpoint=begun", "training.resume_from_checkpoint", "say `fastkd distill --resume`"),
    over(
        "intervals that do not meet",
        ("training.eval_strategy=steps", "training.eval_steps=3", "training.load_best_model_at_end=true"),
        "training",
        "round multiple",
    ),
    over("a compiled student", "training.torch_compile=true", "training.torch_compile", "compile its layers instead"),
    over(
        "batches that accelerate splits",
        "training.accelerator_config={split_batches: true}",
        "training.accelerator_config.split_batches",
        "must be left off",
    ),
    over(
        "noise without padding to scale it",
        ("data.padding_free=true", "training.neftune_noise_alpha=5"),
        "data.padding_free",
        "neftune_noise_alpha",
    ),
    # The run's folder.
    over("the student's folder", ("output_dir=teacher", "student=teacher"), "output_dir", "choose another folder"),
    over("a run that is there", "output_dir=begun", "output_dir", "say --resume, or choose another folder"),
    over("a file as the folder", "output_dir=train.jsonl", "output_dir", "choose another"),
    over("resume with other settings", ("output_dir=begun", "loss.temperature=3", "--resume"), "output_dir", "to resume, use the same"),
    over("resume of a damaged run", ("output_dir=torn", "--resume"), "output_dir", "choose another folder", make=_torn),
    over("resume of a student", ("output_dir=other", "--resume"), "output_dir", "no checkpoint to resume from"),
    # Difficulty and the store.
    over(
        "a scorer with another vocabulary",
        ("student=teacher", "difficulty={signal: loss, scorer: other}"),
        "difficulty.scorer",
        "expected one vocabulary",
        command="score",
    ),
    over(
        "a scorer that is not there",
        "difficulty={signal: loss, scorer: ./nowhere}",
        "difficulty.scorer",
        "no such file or folder",
        command="score",
    ),
    over(
        "a column of difficulty that holds words",
        "difficulty={column: prompt}",
        "difficulty.column",
        "expected a number in every row",
        command="score",
    ),
    over(
        "a column of difficulty that is not there",
        ("difficulty={column: level}", "plan=pocl", "loss={}"),
        "difficulty.column",
        "expected one of the data set's",
        command="score",
    ),
    over(
        "a damaged file of scores",
        ("difficulty={path: mine.parquet}", "plan=pocl", "loss={}"),
        "difficulty.path",
        "give another path, or delete the file",
        command="plan",
        files={"mine.parquet": b"PAR1 nothing"},
    ),
    over(
        "scores of other data",
        ("difficulty={path: scores.parquet}", "plan=pocl", "loss={}"),
        "difficulty.path",
        "were they made from other data?",
        command="plan",
    ),
    over(
        "scores of rows that are joined",
        ("difficulty={signal: steps}", "plan=pocl", "loss={}", "data.packing=true"),
        "difficulty.signal",
        "use loss",
        command="score",
    ),
    over("no store to fill", (), "store", "write store: {kind: hidden", command="cache"),
    over(
        "probabilities at several temperatures",
        ("store={kind: topk}", "loss={}", "plan={stages: [{steps: 2, temperature: {from: 1, to: 2}}]}"),
        "store.kind",
        "expected kind hidden",
    ),
    over(
        "draws for a divergence that needs all",
        ("store={kind: sampled}", "loss={divergence: reverse_kl}"),
        "store.kind",
        "expected forward_kl",
    ),
    over(
        "a store of another teacher",
        ("store={path: store}", "teacher=second"),
        "store",
        "give another store.path, or delete this folder",
        loads=True,
    ),
    over("a file as the store", "store={path: train.jsonl}", "store.path", "expected a folder"),
    # What a plan alone would not need, and the run does.
    over("a plan for another vocabulary", ("student=teacher", "teacher=other"), "teacher", "expected one vocabulary", command="plan"),
    over("a plan for a layer that is not there", "student.layers=[0, 9]", "student.layers", "expected indices from 0 to 3", command="plan"),
    over(
        "a plan for draws where all are needed",
        ("store={kind: sampled}", "loss={divergence: reverse_kl}"),
        "store.kind",
        "or kind hidden",
        command="plan",
    ),
    # Flags.
    flags("no command", "", "COMMAND", "see fastkd --help"),
    flags("an unknown command", "distil run.yaml", "'distil'", "choose from"),
    flags("no configuration", "distill", "CONFIG.yaml", "required: CONFIG.yaml (see fastkd distill --help"),
    flags("a flag of another command", "score run.yaml --resume", "--resume", "see fastkd --help"),
    flags("a flag cut short", "distill run.yaml --resum", "--resum", "see fastkd --help"),
    flags("init over a file", "init run.yaml", "", "choose another name", "run.yaml"),
    flags("init into no folder", "init no/such/mine.yaml", "", "No such file or directory", "no/such/mine.yaml"),
    flags("init with a flag", "init mine.yaml --force", "--force", "see fastkd --help"),
    flags("doctor for a card of less than nothing", "doctor run.yaml --card -8", "argument --card", "a number > 0"),
    flags("doctor for a card in words", "doctor run.yaml --card big", "argument --card", "a number > 0"),
    flags("eval of nothing", "eval", "MODEL", "see fastkd eval --help"),
    flags("eval without data", "eval teacher", "DATA", "give a file or a data set's name", "eval"),
    flags("eval of no model", "eval nowhere eval.jsonl", "", "no such folder here", "eval"),
    flags("eval on no file", "eval teacher nowhere.jsonl", "", "nowhere.jsonl: no such file", "eval"),
    flags("eval on a split of a file", "eval teacher eval.jsonl --split test", "split", "they are for data sets on the hub", "eval"),
    flags("eval by an unknown metric", "eval teacher eval.jsonl --metrics blue", "metrics", "expected some of rouge_l", "eval"),
    flags("eval of no rows", "eval teacher eval.jsonl --rows 0", "rows", "expected a number >= 1", "eval"),
    flags("eval of rows that are a word", "eval teacher eval.jsonl --rows many", "argument --rows", "see fastkd eval --help"),
    flags("eval with half a column", "eval teacher eval.jsonl --column prompt", "--column 'prompt'", "expected OURS=THEIRS", "eval"),
    flags("eval at a negative temperature", "eval teacher eval.jsonl --temperature -1", "temperature", "expected 0 (greedy)", "eval"),
    flags("eval by a share above 1", "eval teacher eval.jsonl --top-p 2", "top_p", "expected a number in (0, 1]", "eval"),
    flags("eval in batches of none", "eval teacher eval.jsonl --batch-size 0", "batch_size", "expected a whole number >= 1", "eval"),
    flags(
        "eval of answers of no token",
        "eval teacher eval.jsonl --max-new-tokens 0",
        "max_new_tokens",
        "expected a whole number >= 1",
        "eval",
    ),
    flags(
        "eval in an unknown dtype",
        "eval teacher eval.jsonl --dtype float33",
        "dtype 'float33'",
        "expected a floating-point torch dtype",
        "eval",
    ),
    flags("eval on an unknown device", "eval teacher eval.jsonl --device gpu", "device", "expected", "eval"),
    flags(
        "standard suites that are not installed", "eval teacher --lm-eval gsm8k", "lm-eval", "pip install 'fastkd[eval]'", lacks="lm_eval"
    ),
    flags("comparison with no file", "score run.yaml --compare nowhere.parquet", "--compare", "nowhere.parquet: no such file", "run.yaml"),
]
