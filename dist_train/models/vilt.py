"""The text side of a ViLT: embedded tags that join the image's tokens in one transformer.

The sequence is [CLS], patches, text. Nothing marks which modality a token is of, and the text embeddings start
untrained (the paper, section on ViLT).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PADDING_ID = 0
"""Id of BERT's [PAD]; its embedding is zero and is not trained."""
BERT_STD = 0.02
"""Standard deviation of BERT's initial embeddings (Devlin et al. 2019)."""


class TextEmbeddings(nn.Module):
    """BERT's input embeddings: word + position + token type 0, layer norm, dropout."""

    def __init__(self, vocab_size: int, max_tokens: int, dim: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, dim, padding_idx=PADDING_ID)
        self.position = nn.Embedding(max_tokens, dim)
        self.token_type = nn.Embedding(1, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        for embedding in (self.word, self.position, self.token_type):
            nn.init.normal_(embedding.weight, std=BERT_STD)
        with torch.no_grad():
            self.word.weight[PADDING_ID].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T), T <= max_tokens, to embeddings (B, T, D)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        token_type = self.token_type(torch.zeros_like(positions[:1]))
        return self.dropout(self.norm(self.word(ids) + self.position(positions) + token_type))


def keep_padding_out(text_mask: Tensor, image_tokens: int) -> Tensor:
    """Attention mask in which no token attends to padding.

    `text_mask` is bool (B, T), True for real tokens; the result is bool (B, 1, 1, image_tokens + T), for all heads
    and queries alike. Image tokens are always attended to, so that no row is empty even where all text is padding.
    """
    image_mask = text_mask.new_ones(text_mask.shape[0], image_tokens)
    return torch.cat([image_mask, text_mask], dim=1)[:, None, None, :]
