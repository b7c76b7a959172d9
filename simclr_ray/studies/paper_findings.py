"""The findings of the SimCLR paper, and the claims of laptops' studies by which each is tried."""

from __future__ import annotations

from typing import Final, NamedTuple


class PaperFinding(NamedTuple):
    """What the paper found.

    Attributes:
        text: The finding.
        source: Figure or table of arXiv:2002.05709.
        claims: Study -> its claims, all of which the finding says.
    """

    text: str
    source: str
    claims: dict[str, tuple[str, ...]]


FINDINGS: Final = (
    PaperFinding(
        "Cropping composed with color distortion is the best pair",
        "Figure 5",
        {
            "composition": (
                "crop with color beats crop alone",
                "crop with color beats crop with Sobel",
                "crop with color beats crop with cutout",
                "crop with color beats cutout with Sobel",
            )
        },
    ),
    PaperFinding(
        "Stronger color helps contrastive learning, and hurts supervised",
        "Table 1",
        {
            "color_strength": (
                "self-supervised, strength 1/2 beats 1/8",
                "supervised, strength 1/8 beats 1/2",
                "strength 1/2 over 1/8 gives self-supervised learning more than supervised",
            )
        },
    ),
    PaperFinding(
        "A head helps, and a nonlinear one more than a linear one",
        "Figure 8",
        {
            "projection_head": (
                "a linear head beats none",
                "a nonlinear head beats none",
                "a nonlinear head beats a linear one",
            )
        },
    ),
    PaperFinding(
        "The layer before the head is better, and the head forgets what views hide",
        "Table 3",
        {
            "what_h_keeps": (
                "h tells rotation, which pretraining has hidden, and g(h) has forgotten it",
                "linear evaluation of h is above that of g(h)",
            )
        },
    ),
    PaperFinding(
        "Normalised embeddings with a middle temperature are best",
        "Table 5",
        {
            "temperature": (
                "τ = 0.1 beats τ = 1",
                "τ = 0.1 beats τ = 0.05",
                "normalised beats not normalised",
                "normalised beats not normalised at a high temperature",
            )
        },
    ),
    PaperFinding(
        "NT-Xent is better than the logistic and the triplet loss",
        "Table 4",
        {
            "losses": (
                "NT-Xent beats semi-hard NT-Logistic",
                "NT-Xent beats the semi-hard triplet loss",
                "NT-Xent beats plain NT-Logistic",
                "NT-Xent beats the plain triplet loss",
            )
        },
    ),
    PaperFinding(
        "Semi-hard mining helps those two",
        "Table 4",
        {
            "losses": (
                "semi-hard mining helps the triplet loss",
                "semi-hard mining helps NT-Logistic",
            )
        },
    ),
    PaperFinding(
        "Wider encoders help contrastive learning, more than supervised",
        "Figure 7",
        {
            "encoder_size": (
                "a wider encoder helps self-supervised learning",
                "a wider encoder gives self-supervised learning more than supervised",
            )
        },
    ),
    PaperFinding(
        "Larger batches help where training is short",
        "Figure 9",
        {"batch_size": ("the largest batch beats the smallest at the shortest length",)},
    ),
    PaperFinding(
        "Longer training helps, and closes the gap between batches",
        "Figures 9 and B.2",
        {
            "long_training": ("40 epochs beat 10", "40 epochs beat 20"),
            "batch_size": ("the gap closes with longer training",),
        },
    ),
    PaperFinding(
        "The square-root rule helps small batches, LARS large ones",
        "Section 2.2, Table B.1",
        {
            "optimizer": (
                "the square-root rule helps the small batch",
                "LARS beats SGD at the largest batch",
            )
        },
    ),
)
