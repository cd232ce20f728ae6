"""Sizes that make a model of any type small: values by field name, and further values that some types need."""

from __future__ import annotations

from typing import Any

VOCABULARY = 160
WIDTH = 32
# Field → value, for every configuration that has the field.
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 160, "intermediate_size": 64,
    "max_position_embeddings": 64, "num_key_value_heads": 2, "patch_size": 4, "image_size": 16, "head_dim": 8,
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_heads": 4, "projection_dim": 32,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "type_vocab_size": 2, "n_embd": 32,
    "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64, "dim": 32, "n_layers": 2, "n_heads": 4,
    "hidden_dim": 64, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "embedding_size": 32,
    "d_inner": 64, "ffn_dim": 64, "sliding_window": 8, "image_token_id": 150, "image_token_index": 150,
    "video_token_id": 151, "video_token_index": 151, "audio_token_id": 152, "audio_token_index": 152,
    "vision_start_token_id": 153, "vision_end_token_id": 154, "max_source_positions": 64, "max_target_positions": 64,
    "num_mel_bins": 16, "depth": 2, "embed_dim": 32, "out_hidden_size": 32, "shared_expert_intermediate_size": 32,
    "emb_dim": 32, "first_k_dense_replace": 1, "n_ctx": 64, "num_encoder_layers": 2, "num_experts_per_token": 2,
    "num_attention_heads_per_layer": 4, "moe_topk": 2, "moe_shared_expert_intermediate_size": 32,
    "ffn_hidden_size": 64, "kv_channels": 8, "layers": 2, "num_heads_per_layer": 4, "mlp_dim": 64, "output_dim": 32,
    "ssm_state_size": 8, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": "auto",
    "mamba_chunk_size": 8, "chunk_size": 8, "mamba_expand": 2, "mamba_n_groups": 1, "index_n_heads": 4,
    "index_head_dim": 16, "index_topk": 8, "lru_width": 32, "attention_window_size": 8, "expert_layer_period": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1, "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 8, "query_pre_attn_scalar": 8, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "num_register_tokens": 2,
    "mlp_hidden_size": 64, "encoder_embed_dim": 32, "decoder_embed_dim": 32, "codebook_size": 32, "num_queries": 8,
    "head_width": 8, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "conv_depthwise_kernel_size": 7, "window_size": 4, "max_seq_len": 64, "image_seq_length": 16,
    "text_embed_dim": 32, "vision_embed_dim": 32, "hidden_act_dim": 32, "num_codevectors_per_group": 8,
    "codevector_dim": 16, "proj_codevector_dim": 16, "mask_time_length": 2, "mask_time_min_masks": 0, "dim_head": 8,
    "attention_head_dim": 8, "time_step_rank": 8, "n_mels": 16, "feature_size": 16, "num_global_key_value_heads": 2,
    "global_head_dim": 8, "spatial_merge_size": 2, "temporal_patch_size": 1, "num_position_embeddings": 64,
    "in_channels": 3, "encoder_hidden_size": 32, "cross_attention_hidden_size": 32, "shared_intermediate_size": 64,
    "moe_num_experts": 4, "moe_k": 2, "moe_intermediate": 32, "n_expert": 4, "expert_dim": 32,
    "linear_num_heads": 4, "linear_head_dim": 8,
}  # fmt: skip

# Type → the values of its fields.
_OF_TYPES: dict[str, dict[str, Any]] = {
    "albert": {"num_hidden_layers": 3, "embedding_size": 16, "num_hidden_groups": 1},
    "align": {
        "text_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "vocab_size": 160,
        },
        "vision_config": {
            "width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 80, "image_size": 32,
        },
        "projection_dim": 80, "temperature_init_value": 1.0,
    },
    "audio-spectrogram-transformer": {
        "max_length": 32, "num_mel_bins": 16, "patch_size": 4, "frequency_stride": 4, "time_stride": 4,
    },
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "beit data2vec-vision": {"use_relative_position_bias": True},
    "bert-generation": {"is_decoder": False},
    "big_bird bigbird_pegasus": {"attention_type": "original_full"},
    "bitnet deepseek_v3 deepseek_v32 axk1 axk2 glm4_moe_lite glm_moe_dsa minicpm3 mistral4 mistral_large4_text "
    "dots3_note_text longcat_flash youtu": {"num_key_value_heads": 4},
    "bloom splinter megatron-bert nezha ernie mra": {"hidden_size": 32},
    "bridgetower": {
        "text_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "vocab_size": 160, "max_position_embeddings": 66,
        },
        "vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 4, "image_size": 16},
        "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
    },
    "canine": {
        "num_hash_buckets": 32, "num_hash_functions": 4, "local_transformer_stride": 4, "downsampling_rate": 2,
    },
    "clap": {
        "audio_config": {
            "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 16, "hidden_size": 32,
            "depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 16, "window_size": 4,
            "enable_fusion": False,
        },
    },
    "codegen gptj": {"rotary_dim": 4},
    "convbert": {"conv_kernel_size": 3, "embedding_size": 32},
    "convnext convnextv2": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "image_size": 32},
    "cpmant": {"dim_model": 32, "prompt_length": 4, "prompt_types": 4},
    "ctrl": {"n_ctx": 64, "dff": 64},
    "cvt": {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "num_channels": 3},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deberta deberta-v2": {
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
        "max_relative_positions": -1,
    },
    "dinat": {"depths": [1, 1], "num_heads": [2, 2]},
    "dpr": {"projection_dim": 0},
    "efficientformer": {"image_size": 32},
    "efficientnet": {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_k": 2},
    "esm": {"mask_token_id": 4, "position_embedding_type": "absolute", "token_dropout": False},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8},
    "flaubert xlm": {"causal": False, "max_position_embeddings": 64, "n_langs": 1},
    "focalnet": {
        "image_size": 32, "embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3],
        "patch_size": 4,
    },
    "fsmt": {"langs": ["en", "de"], "src_vocab_size": 160, "tgt_vocab_size": 160},
    "funnel": {
        "block_sizes": [1, 1], "d_head": 8, "d_inner": 64, "d_model": 32, "num_decoder_layers": 1,
        "block_repeats": [1, 1], "architectures": ["FunnelModel"],
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "num_hidden_layers": 4, "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "laurel_rank": 8, "intermediate_size": 64,
    },
    "gemma4_text": {
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
    },
    "glpn": {
        "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 1, 2, 2], "sr_ratios": [1, 1, 1, 1],
        "patch_sizes": [3, 3, 3, 3], "image_size": 32, "decoder_hidden_size": 16,
    },
    "gpt_bigcode": {"multi_query": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "hiera": {
        "image_size": [32, 32], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
        "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3], "masked_unit_size": [8, 8],
    },
    "hunyuan_v1_dense ministral nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"moe_topk": 2, "head_dim": 8, "num_key_value_heads": 2},
    "idefics3 smolvlm": {
        "text_config": {
            "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 160, "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": 16, "patch_size": 4,
        },
        "scale_factor": 2, "image_token_id": 150,
    },
    "jamba": {"mamba_d_state": 8, "mamba_dt_rank": 8, "num_experts": 4, "use_mamba_kernels": False},
    "layoutlm layoutlmv2 layoutxlm lilt bros": {"max_2d_position_embeddings": 64},
    "layoutlmv3": {
        "max_2d_position_embeddings": 64, "coordinate_size": 4, "shape_size": 8, "input_size": 16,
        "has_spatial_attention_bias": False, "has_relative_attention_bias": False,
    },
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "levit": {
        "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [4, 4, 4],
        "image_size": 64, "patch_size": 16, "kernel_size": 3,
    },
    "llama4_text": {"interleave_moe_layer_step": 1, "num_experts_per_tok": 1, "intermediate_size_mlp": 64},
    "llava": {
        "text_config": {
            "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 160, "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "image_size": 16, "patch_size": 4, "projection_dim": 32,
        },
        "image_token_index": 150, "image_token_id": 150, "vision_feature_layer": -2,
    },
    "longformer": {"attention_window": 4},
    "longt5": {"local_radius": 3, "global_block_size": 4, "decoder_start_token_id": 0},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "mgp-str": {"image_size": [16, 16], "patch_size": 4},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mobilebert": {
        "true_hidden_size": 32, "embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2,
    },
    "mobilevit": {
        "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "image_size": 32,
        "patch_size": 2,
    },
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "modernbert modernbert-decoder": {
        "global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 5, "sep_token_id": 6,
    },
    "mpt": {"max_seq_len": 64},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
    "nllb-moe": {"expert_capacity": 64, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "nystromformer": {"hidden_size": 32, "num_landmarks": 8, "segment_means_seq_len": 8},
    "paligemma": {
        "text_config": {
            "model_type": "gemma", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 160, "max_position_embeddings": 64,
            "pad_token_id": 0, "head_dim": 8,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "image_size": 16, "patch_size": 4,
        },
        "projection_dim": 32, "image_token_index": 150, "image_token_id": 150,
    },
    "pegasus_x": {"num_global_tokens": 4, "block_size": 4},
    "perceiver": {
        "num_latents": 8, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
    },
    "phi3": {"pad_token_id": 0},
    "poolformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "prophetnet": {
        "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "ngram": 2, "num_buckets": 8, "relative_max_distance": 16,
    },
    "pvt pvt_v2": {
        "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
        "image_size": 32,
    },
    "qwen2_5_vl": {
        "text_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 64, "vocab_size": 160, "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 153, "vision_end_token_id": 154,
    },
    "qwen2_audio": {
        "text_config": {
            "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 160, "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        "audio_config": {
            "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64, "num_mel_bins": 16, "max_source_positions": 32,
        },
    },
    "qwen2_vl": {
        "text_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 64, "vocab_size": 160, "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        "image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 153, "vision_end_token_id": 154,
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5,
        },
    },
    "qwen2_vl_text qwen2_5_vl_text glm4v_text glm_image_text glm_ocr_text paddleocr_vl_text qwen2_5_omni_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4, "num_buckets": 2, "hash_seed": 0, "attention_head_size": 8, "is_decoder": True,
        "feed_forward_size": 64,
    },
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    "rembert": {"hidden_size": 32, "input_embedding_size": 16, "output_embedding_size": 16},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "roberta xlm-roberta camembert data2vec-text roberta-prelayernorm xlm-roberta-xl": {
        "max_position_embeddings": 66,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "segformer": {
        "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
        "sr_ratios": [2, 2, 1, 1], "decoder_hidden_size": 16,
    },
    "sew sew-d": {"conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 1], "conv_stride": [5, 2, 1], "squeeze_factor": 2},
    "squeezebert": {
        "embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1,
        "intermediate_groups": 1, "output_groups": 1,
    },
    "swin swinv2 donut-swin maskformer-swin": {
        "image_size": 32, "patch_size": 4, "window_size": 2, "embed_dim": 16, "depths": [1, 1, 1],
        "num_heads": [2, 2, 4],
    },
    "switch_transformers": {
        "decoder_start_token_id": 0, "expert_capacity": 64, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "t5 mt5 umt5": {"decoder_start_token_id": 0},
    "t5gemma t5gemma2 plbart": {"decoder_start_token_id": 1},
    "timesformer": {"num_frames": 4, "image_size": 16},
    "videomae": {
        "num_frames": 4, "image_size": 16, "tubelet_size": 2, "decoder_num_hidden_layers": 1,
        "decoder_hidden_size": 32, "decoder_num_attention_heads": 4,
    },
    "vipllava": {
        "text_config": {
            "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 160, "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "image_size": 16, "patch_size": 4, "projection_dim": 32,
        },
        "image_token_index": 150, "image_token_id": 150, "vision_feature_layer": -2,
        "vision_feature_layers": [-2, -1],
    },
    "vit_mae": {
        "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 32, "mask_ratio": 0.5,
    },
    # Without these values it would draw the lengths of sounds at random in each pass.
    "vits": {
        "flow_size": 32, "spectrogram_bins": 17, "upsample_initial_channel": 32, "upsample_rates": [4, 2],
        "upsample_kernel_sizes": [8, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
        "duration_predictor_filter_channels": 32, "prior_encoder_num_flows": 2, "prior_encoder_num_wavenet_layers": 2,
        "posterior_encoder_num_wavenet_layers": 2, "use_stochastic_duration_prediction": False, "noise_scale": 0.0,
    },
    "vivit": {"num_frames": 4, "image_size": 16, "tubelet_size": [2, 4, 4]},
    "wav2vec2 hubert wavlm unispeech unispeech-sat data2vec-audio": {
        "conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2], "num_feat_extract_layers": 3,
    },
    "wav2vec2-bert": {
        "feature_projection_input_dim": 16, "left_max_position_embeddings": 8, "right_max_position_embeddings": 8,
        "max_source_positions": 64,
    },
    "wav2vec2-conformer speecht5": {"conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2]},
    "xlnet": {"d_head": 8},
    "xlstm": {
        "num_heads": 4, "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native", "step_kernel": "native",
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "textnet": {
        "image_size": [64, 64], "stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 32],
        "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]], "conv_layer_strides": [[1], [2], [2], [2]],
    },
    "xmod": {"max_position_embeddings": 66, "languages": ["en_XX"], "default_language": "en_XX"},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "cosmos3_edge_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        },
    },
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 4, "qk_rope_head_dim": 0},
    "hunyuan_vl_text": {
        "head_dim": 8, "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1],
            "xdrope_section": [1, 1, 1, 1],
        },
    },
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "longcat_flash": {
        "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64,
    },
    "seamless_m4t seamless_m4t_v2": {
        "speech_encoder_layers": 2, "speech_encoder_intermediate_size": 64, "t2u_encoder_layers": 2,
        "t2u_decoder_layers": 2, "t2u_encoder_ffn_dim": 64, "t2u_decoder_ffn_dim": 64, "t2u_vocab_size": 160,
        "char_vocab_size": 160, "unit_hifi_gan_vocab_size": 160, "unit_embed_dim": 32, "lang_embed_dim": 16,
        "spkr_embed_dim": 16, "upsample_initial_channel": 32, "variance_predictor_hidden_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
    "yolos": {"image_size": [16, 32], "num_detection_tokens": 5},
    "yoso": {"hidden_size": 32, "use_expectation": True},
    "zamba": {
        "mamba_d_state": 8, "n_mamba_heads": 2, "mamba_dt_rank": 8, "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "attention_head_dim": 16,
        "attention_hidden_size": 64, "use_mamba_kernels": False, "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 8,
        "chunk_size": 8, "use_mem_eff_path": False, "num_key_value_heads": 4,
    },
}  # fmt: skip
OF_TYPE = {name: sizes for names, sizes in _OF_TYPES.items() for name in names.split()}
