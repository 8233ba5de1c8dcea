"""Liger's fused JSD on hidden states and the teacher's head: python examples/train_liger.py DATASET STUDENT_DIRECTORY [STEPS]

The dataset has hidden_states; the student is a causal model of transformers with the teacher's vocabulary. Runs where liger-kernel is.
"""

import sys

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from transformers import AutoModelForCausalLM

from logit_dataset import load_logits, load_teacher_head

dataset, directory, steps = sys.argv[1], sys.argv[2], int(sys.argv[3] if sys.argv[3:] else 100)
device = "cuda" if torch.cuda.is_available() else "cpu"
batches, head = load_logits(dataset).batches(batch_size=4), load_teacher_head(dataset).to(device)
assert head.softcap is None, "Liger's loss has no soft-cap; use dense_kl_from_hidden"
student = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
jsd = LigerFusedLinearJSDLoss(
    weight_hard_loss=0.0,
    weight_soft_loss=1.0,
    beta=0.0,  # KL(teacher ‖ student); 0.5 for the Jensen–Shannon divergence
    compiled=device == "cuda",
)
weight = head.weight_VD.float() * head.scale  # logits = scale · (h Wᵀ + b)
bias = None if head.bias_V is None else head.bias_V.float() * head.scale
losses: list[float] = []
while len(losses) < steps:
    for batch in batches:
        batch = {name: values.to(device) for name, values in batch.items()}
        ids, mask = batch["input_ids"].long(), batch["mask"]
        hidden = student.model(ids, use_cache=False).last_hidden_state[mask]
        counted = torch.zeros(len(hidden), dtype=torch.long, device=device)  # none is −100
        states = batch["hidden_states"][mask].float()
        loss = jsd(hidden, student.lm_head.weight, states, weight, counted, None, bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {len(losses):>5}  {losses[-1]:.4f} nats")
        if len(losses) == steps:
            break
