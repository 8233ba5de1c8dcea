"""Lightning (pip install lightning): python examples/train_lightning.py DATASET MODEL student/"""

import sys

import lightning
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from logit_dataset import LogitCollator, distillation_loss


class Student(lightning.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name)  # has the teacher's tokenizer

    def training_step(self, batch, _):
        logits = self.model(batch["input_ids"], batch["attention_mask"]).logits
        loss = distillation_loss(logits, batch, loss="tail_bucket")  # "tail_draws" if it has draws
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


dataset, model, output = sys.argv[1:]
rows = load_dataset(dataset, split="train").with_format("numpy")
loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=LogitCollator.of(dataset))
student = Student(model)
lightning.Trainer(max_epochs=1, default_root_dir=output, logger=False).fit(student, loader)
student.model.save_pretrained(output)
