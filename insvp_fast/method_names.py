"""The names of the methods; without torch, for a command line that only lists them."""

__all__ = ["METHODS"]

METHODS: dict[str, str] = {
    "linear": "the head alone, on frozen features",
    "full": "the whole backbone and the head",
    "partial_1": "the last block, the last norm and the head (Yosinski et al., NeurIPS 2014)",
    "mlp_3": "a head of three layers, on frozen features (Chen et al., 2020)",
    "bias": "the biases and the head (BitFit, Ben Zaken et al., ACL 2022)",
    "adapter": "a bottleneck behind each MLP (Pfeiffer et al., EMNLP 2020)",
    "adaptformer": "a scaled bottleneck beside each MLP (Chen et al., NeurIPS 2022)",
    "lora": "low-rank changes of the projections to queries and values (Hu et al., ICLR 2022)",
    "ssf": "a scale and a shift behind each operation (Lian et al., NeurIPS 2022)",
    "sidetune": "a small network beside the backbone, blended into its features (Zhang et al., ECCV 2020)",
    "vp": "a frame of pixels around the image (Bahng et al., 2022)",
    "vpt_shallow": "tokens in the first block, whose outputs go on through all others (Jia et al., ECCV 2022)",
    "vpt_deep": "tokens in each block, whose outputs are discarded (Jia et al., ECCV 2022)",
    "e2vpt": "tokens, under masks that prune them, and keys and values (Han et al., ICCV 2023)",
    "vfpt": "tokens, of which a fraction passes a Fourier transform (Zeng et al., NeurIPS 2024)",
    "vapt": "maps that make tokens from the tokens of their block (Le et al., arXiv 2501.18936)",
    "dualprompt": "keys and values in a few blocks (Wang et al., ECCV 2022)",
    "dam_vp": "a frame of pixels for each cluster of images (Huang et al., CVPR 2023)",
}
