"""The networks that are tried, by library and family: the smallest published ones of each."""

Families = dict[str, tuple[str, ...]]

TORCHVISION: Families = {
    "AlexNet, VGG": ("alexnet", "vgg11"),
    "ResNet": ("resnet18", "resnet50"),
    "SqueezeNet": ("squeezenet1_1",),
    "DenseNet": ("densenet121",),
    "GoogLeNet": ("googlenet",),
    "Inception v3": ("inception_v3",),
    "MobileNet": ("mobilenet_v2", "mobilenet_v3_small"),
    "ShuffleNet, MNASNet": ("shufflenet_v2_x0_5", "mnasnet0_5"),
    "EfficientNet": ("efficientnet_b0",),
    "RegNet": ("regnet_y_400mf",),
    "ConvNeXt": ("convnext_tiny",),
    "Swin, Swin v2": ("swin_t", "swin_v2_t"),
    "ViT": ("vit_b_32",),
    "MaxViT": ("maxvit_t",),
}
TIMM: Families = {
    "ViT": ("vit_tiny_patch16_224", "vit_little_patch16_reg1_gap_256"),
    "DeiT": ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
    "DINOv2": ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"),
    "DINOv3": ("vit_tiny_patch16_dinov3_qkvb", "vit_small_patch16_dinov3"),
    "CLIP": ("vit_xsmall_patch16_clip_224", "vit_medium_patch32_clip_224", "resnet50_clip"),
    "SigLIP": ("vit_base_patch32_siglip_256", "vit_base_patch32_siglip_gap_256"),
    "EVA02": ("eva02_tiny_patch14_224", "eva02_base_patch16_clip_224"),
    "BEiT": ("beit_base_patch16_224", "beitv2_base_patch16_224"),
    "CaiT": ("cait_xxs24_224", "cait_xxs36_224"),
    "XCiT": ("xcit_nano_12_p16_224", "xcit_tiny_12_p16_224"),
    "CoaT": ("coat_tiny", "coat_lite_tiny"),
    "CrossViT": ("crossvit_tiny_240", "crossvit_9_dagger_240"),
    "ConViT": ("convit_tiny", "convit_small"),
    "PiT, VOLO, TNT": ("pit_ti_distilled_224", "volo_d1_224", "tnt_s_patch16_224"),
    "Swin": ("swin_tiny_patch4_window7_224", "swin_s3_tiny_224"),
    "Swin v2": ("swinv2_tiny_window8_256", "swinv2_cr_tiny_224"),
    "Hiera": ("hiera_tiny_224", "hiera_small_abswin_256"),
    "MaxViT": ("maxvit_pico_rw_256", "maxvit_rmlp_pico_rw_256"),
    "CoAtNet": ("coatnet_pico_rw_224", "coatnet_rmlp_nano_rw_224"),
    "MViT v2": ("mvitv2_tiny", "mvitv2_small_cls"),
    "PVT v2": ("pvt_v2_b0", "pvt_v2_b1"),
    "PoolFormer, CAFormer": ("poolformer_s12", "caformer_s18"),
    "ConvNeXt": ("convnext_atto", "convnext_femto"),
    "ConvNeXt v2": ("convnextv2_atto", "convnextv2_femto"),
    "MobileNet v3": ("mobilenetv3_small_050",),
    "MobileNet v4": ("mobilenetv4_conv_small", "mobilenetv4_hybrid_medium"),
    "EfficientNet": ("efficientnet_b0", "efficientnetv2_rw_t"),
    "RegNet": ("regnetx_002", "regnety_002"),
    "LeViT": ("levit_128s", "levit_conv_128s"),
    "TinyViT": ("tiny_vit_5m_224", "tiny_vit_11m_224"),
    "MLP-Mixer": ("mixer_s32_224", "mixer_s16_224"),
    "NaFlexViT": ("naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip"),
    "EfficientViM": ("efficientvim_m1",),
}
OPEN_CLIP: Families = {
    "CLIP, ViT": ("ViT-S-32-alt", "ViT-M-32", "ViT-B-32", "ViT-B-32-quickgelu"),
    "CLIP, others": ("RN50", "convnext_base", "EVA02-B-16"),
    "CoCa": ("coca_ViT-B-32",),
    "SigLIP": ("ViT-B-16-SigLIP",),
    "MobileCLIP": ("MobileCLIP-S1",),
}
"""Functions of `made`, of transformers and of sentence-transformers: small configurations."""
TRANSFORMERS: Families = {
    "ViT, DeiT, BEiT": ("vit", "deit", "beit"),
    "DINOv2": ("dinov2", "dinov2_registers"),
    "DINOv3": ("dinov3_vit", "dinov3_convnext"),
    "Swin": ("swin", "swinv2"),
    "ConvNeXt": ("convnext", "convnextv2"),
    "ResNet": ("resnet",),
    "PVT v2, Hiera": ("pvt_v2", "hiera"),
    "MobileNet v2, EfficientNet": ("mobilenet_v2", "efficientnet"),
    "CLIP": ("clip", "clip_vision"),
    "SigLIP": ("siglip", "siglip_vision"),
    "SigLIP2": ("siglip2",),
    "BLIP, Chinese CLIP": ("blip", "chinese_clip"),
}
SENTENCE_TRANSFORMERS: Families = {
    "CLIP, SigLIP": ("sentences_clip", "sentences_siglip"),
    "vision models": ("sentences_dinov2", "sentences_vit_dense"),
}
SOURCES: dict[str, tuple[str, Families]] = {
    "torchvision": ("torchvision", TORCHVISION),
    "timm": ("timm", TIMM),
    "transformers": ("scripts.networks.made", TRANSFORMERS),
    "open_clip": ("open_clip", OPEN_CLIP),
    "sentence-transformers": ("scripts.networks.made", SENTENCE_TRANSFORMERS),
}
"""Of each library how its networks are named to `load_network`, and its families."""
