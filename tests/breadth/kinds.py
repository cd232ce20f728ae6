"""Properties of models that can cause faults → types that have them; every run of the tests builds these types."""

from __future__ import annotations

TEXTS = {
    "norms behind the sums": ["bert"],
    "norms in front of the branches": ["llama"],
    "norms in front of the branches and behind them": ["gemma2"],
    "final norm registered outside of the stack, or named otherwise": ["t5gemma", "lfm2", "bigbird_pegasus"],
    "norms that are not called by that name": ["flaubert", "squeezebert"],
    "norms of queries and keys": ["qwen3"],
    "gated norms of mixers": ["mamba2", "jamba"],
    "router and hyper-connections, streams beside the width": ["deepseek_v4"],
    "norms of embeddings for each layer": ["gemma4_text"],
    "experts, whose rows are flat": ["llama4_text", "dbrx"],
    "positions before examples": ["xlnet", "fsmt"],
    "shortened sequences": ["funnel"],
    "more rows than positions": ["cpmant"],
    "several streams of positions": ["prophetnet"],
    "modules called several times": ["albert", "xmod"],
    "two sides": ["t5"],
}
MEDIA = {
    "channels first": ["convnext", "poolformer"],
    "normalised over batches": ["resnet"],
    "windows of images": ["swin"],
    "two towers": ["clip", "siglip"],
    "a tower for images beside a language model": ["llava", "qwen2_vl"],
    "sounds": ["wav2vec2", "whisper"],
    "final norm beside convolutions for positions": ["wav2vec2-conformer"],
    "norms in front of the branches of images": ["vit"],
}
STREAMS = {
    "norms in front of the branches": ["llama", "t5", "bart"],
    "norms behind the sums": ["bert"],
    "norms on both sides": ["gemma2"],
    "branches beside each other": ["gptj", "falcon"],
    "weights stored the other way": ["gpt2"],
    "scaled embeddings": ["gemma"],
    "experts as one parameter, some with biases": ["mixtral", "gpt_oss", "dbrx", "llama4_text"],
    "experts as modules, of which some are not called": ["switch_transformers"],
    "mixers with linear ends": ["mamba", "jamba", "rwkv"],
    "modules called several times": ["albert", "zamba"],
    "streams that are mixed": ["deepseek_v4"],
    "streams scaled by feature": ["doge"],
    "convolutions": ["convnext", "segformer"],
    "positions as parameters": ["vit"],
    "windows": ["swin"],
    "two towers": ["clip"],
    "images in texts": ["llava"],
    "attention of torch": ["siglip"],
    "sounds": ["whisper"],
}
GRADIEND = {
    "masked": ["bert"],
    "causal": ["gpt2", "mamba"],
    "sequence to sequence": ["t5"],
    "weights shared by layers": ["albert"],
    "no words to predict: images, sounds": ["convnext", "wav2vec2"],
}


def chosen(kinds: dict[str, list[str]]) -> list[str]:
    """All types of a table."""
    return [name for names in kinds.values() for name in names]
