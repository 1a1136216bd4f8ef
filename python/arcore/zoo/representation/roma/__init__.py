"""RoMA: autoregressive pretraining of a Mamba encoder on images (Wang et al., arXiv:2503.10392).

An image is cut into patches, and 4 x 4 patches make a cluster. A Mamba encoder reads all clusters but the last, cluster
by cluster in raster order; from the features of clusters 0..s a decoder predicts the pixels of cluster s + 1. The
decoder's queries are positions only and do not see each other: four blocks of cross-attention under
`masks.block_causal`, each on features of another depth. One window of the input is rotated
(`arcore.data.adaptive_rotation`) and its patches are marked by a learned vector, while the target stays upright.

What is trained is the encoder; `RoMAClassifier` goes on with it. Targets and loss are in `arcore.objectives`
(`next_cluster_loss`). Published weights were trained on images normalised with ImageNet's mean and deviation.

Legend: B rows, p pixels and G patches per side, s patches per side of a cluster, N = G^2 patches, L = N - s^2 tokens,
C width of the encoder, D width of the decoder, P = p^2 * channels values of a patch.
"""

from arcore.catalog import System

SYSTEM = System(
    name="roma",
    title="RoMA",
    paper="arXiv:2503.10392",
    paper_title="RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing",
    topic="representation",
    kind="model",
    model="RoMA",
    builds_on=("mamba",),
    ops=("selective_scan", "block_sparse_attention"),
    recipe="next_cluster",
    summary="Pretrains a Mamba image encoder by predicting the next cluster of patches.",
    claim=(
        "After seconds of training on mosaics of digits, held-out clusters are predicted with under 0.9 "
        "of the error of predicting each patch's mean, and no gradient comes from later clusters."
    ),
    checked_on="real data",
    aliases=("arm",),
)
