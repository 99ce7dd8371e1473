"""A real language model, small enough for a test, distilled into some of its own layers."""

import torch
from datasets import Dataset

from fastkd.models import keep_layers
from fastkd.trainer import KDConfig, KDTrainer

from .stories import decode, load_stories


def test_a_cut_student_comes_closer_to_its_real_teacher(tmp_path, shared_data):
    folder = shared_data("stories260K")
    teacher = load_stories(folder / "stories260K.bin")
    torch.manual_seed(0)
    with torch.no_grad():
        stories = teacher.generate(torch.full((48, 1), 1), attention_mask=torch.ones(48, 1), max_new_tokens=63, do_sample=True, top_k=0)
    text = decode(stories[0].tolist(), folder / "tok512.bin")
    assert any(word in text for word in ("Once", "day", "Lily", "Tim", "little")), text  # the weights are where they belong

    data = Dataset.from_dict({"input_ids": stories.tolist()})
    student = keep_layers(teacher, [0, 2, 4])
    run = KDTrainer(
        student,
        teacher,
        KDConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            per_device_train_batch_size=8,
            num_train_epochs=10,
            learning_rate=3e-3,
            max_length=64,
        ),
        data.select(range(40)),
        data.select(range(40, 48)),
    )
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_kl"] < 0.5 * before["eval_kl"], (before, after)
    assert after["eval_agreement"] > before["eval_agreement"] + 0.05, (before, after)
