"""Trainer and PEFT with the model of transformers."""

import pytest
import torch
from support.hf_cases import of, pair
from support.model_cases import padded, small_model, tokens
from transformers import Trainer, TrainingArguments

from jetkernels.model import JetNemotronForCausalLM

pytest.importorskip("accelerate", reason="needs the package accelerate")
ROWS = [tokens(length, seed=length) for length in (5, 9, 7, 12)]
DATA = [{"input_ids": row} for row in ROWS]


def collate(examples):
    ids, mask = padded([example["input_ids"] for example in examples], left=False)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(model, folder, **options) -> Trainer:
    arguments = TrainingArguments(
        folder, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, seed=0, **options
    )
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA, data_collator=collate)


def mean_loss(model) -> torch.Tensor:
    """Over all tokens of all rows, each alone."""
    losses = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in ROWS]
    return sum(losses) / sum(len(row) - 1 for row in ROWS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_the_trainer_is_a_step_of_ours(tmp_path, checkpointing):
    """The loss is a mean over tokens, however they fall into micro-batches."""
    ours, theirs = pair()
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2, "optim": "sgd"}
    options |= {"learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    run = trainer(theirs, tmp_path, gradient_checkpointing=checkpointing, **options)
    assert run.evaluate()["eval_loss"] == pytest.approx(mean_loss(ours).item(), rel=1e-5)
    run.train()
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(mean_loss(ours))
        losses[-1].backward()
        optimizer.step()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert list(map(float, logged)) == pytest.approx([loss.item() for loss in losses], rel=1e-4)
    found = theirs.state_dict()
    for name, parameter in ours.state_dict().items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-5)
    assert run.evaluate()["eval_loss"] == pytest.approx(mean_loss(ours).item(), rel=1e-5) != losses[0].item()
    run.save_model(tmp_path / "saved")
    torch.testing.assert_close(mean_loss(JetNemotronForCausalLM.from_pretrained(tmp_path / "saved")), mean_loss(ours))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters(tmp_path, checkpointing):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    ours = small_model()
    layers = ["q_proj", "o_proj", "w1", "w2", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=layers, r=2)
    model = peft.get_peft_model(of(ours), config)
    ids, mask = padded(ROWS, left=True)
    before = mean_loss(model).item()
    assert before == pytest.approx(mean_loss(ours).item(), rel=1e-5)
    run = trainer(model, tmp_path, max_steps=3, learning_rate=0.1, gradient_checkpointing=checkpointing)
    run.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained) and {name.split(".lora_")[0][-2:] for name in trained} >= {"w2"}
    assert mean_loss(model).item() < before - 0.1
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(of(ours), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids, mask).logits, model.eval()(ids, mask).logits, rtol=0, atol=1e-5)
    merged = again.merge_and_unload()
    assert torch.equal(merged.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), expected)
    merged.save_pretrained(tmp_path / "merged")
    found = JetNemotronForCausalLM.from_pretrained(tmp_path / "merged").generate(ids, mask, 6)
    assert torch.equal(found, expected)


def test_a_smoothed_loss_is_of_the_next_token(tmp_path):
    model = of(small_model())
    found = trainer(model, tmp_path, label_smoothing_factor=0.1, per_device_eval_batch_size=1).evaluate()["eval_loss"]
    with torch.no_grad():
        losses = []
        for row in ROWS:
            logs = model(row[None]).logits[0, :-1].log_softmax(-1)
            losses.append((0.9 * -logs.gather(1, row[1:, None])[:, 0] + 0.1 * -logs.mean(-1)).mean())
    assert found == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_a_run_that_was_interrupted_goes_on(tmp_path):
    whole, resumed = of(small_model()), of(small_model())
    run = trainer(whole, tmp_path, max_steps=4, learning_rate=0.1)
    run.args.save_strategy, run.args.save_steps = "steps", 2
    run.train()
    trainer(resumed, tmp_path, max_steps=4, learning_rate=0.1).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    found = resumed.state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())
