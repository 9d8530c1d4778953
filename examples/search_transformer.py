"""Searches the blocks of a transformer, on batches that are dicts, as those of Hugging Face are."""

import torch
from torch import nn
from torch.utils.data import DataLoader

import fastnas
from fastnas.nn import Choice, split_parameters

WIDTH, LENGTH, LETTERS = 16, 12, 8


class Block(nn.Module):
    """Adds attention, or a wide layer, of the normalised input."""

    def __init__(self, heads=0, factor=0):
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(WIDTH), heads
        if heads:
            self.layer = nn.MultiheadAttention(WIDTH, heads, batch_first=True)
        else:
            wide = factor * WIDTH
            self.layer = nn.Sequential(nn.Linear(WIDTH, wide), nn.GELU(), nn.Linear(wide, WIDTH))

    def forward(self, x, mask):
        h = self.norm(x)
        if self.heads:
            return x + self.layer(h, h, h, key_padding_mask=~mask, need_weights=False)[0]
        return x + self.layer(h)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters, self.out = nn.Embedding(LETTERS, WIDTH), nn.Linear(WIDTH, 1)
        attentions = {f"heads_{n}": Block(heads=n) for n in (1, 4)}
        wides = {f"wide_{n}": Block(factor=n) for n in (2, 4)}
        # Of "gdas" one candidate runs at a time.
        self.blocks = nn.ModuleList(Choice(block, mixing="gdas") for block in (attentions, wides))

    def forward(self, input_ids, mask):
        x = self.letters(input_ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(x[:, 0]).squeeze(-1)


def batches():
    """Rows of letters of several lengths; the label is whether the first letter comes once more."""
    ids, lengths = torch.randint(LETTERS, (512, LENGTH)), torch.randint(6, LENGTH + 1, (512, 1))
    mask = torch.arange(LENGTH) < lengths
    labels = ((ids[:, 1:] == ids[:, :1]) & mask[:, 1:]).any(1).float()
    rows = [dict(zip(("input_ids", "mask", "labels"), row)) for row in zip(ids, mask, labels)]
    return DataLoader(rows, batch_size=64, shuffle=True)


def loss(model, batch):
    logits = model(batch["input_ids"], batch["mask"])
    return nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"])


torch.manual_seed(0)
model = Transformer()
weights, logits = map(torch.optim.Adam, split_parameters(model), (3e-3, 3e-2))
search = fastnas.ChoiceSearch(
    model, batches(), batches(), epochs=10, loss=loss, samples=2, tau=(5, 0.5),
    weight_optimizer=weights, logit_optimizer=logits,
)  # fmt: skip
for row in search.run():
    losses = f"train {row['train_loss']:.3f}, valid {row['valid_loss']:.3f}"
    print(f"epoch {row['epoch']}: {losses}; {', '.join(row['derived'].values())}")
print("derived:", search.derived_network().blocks)
