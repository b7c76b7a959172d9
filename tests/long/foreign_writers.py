"""Write state dicts by transformers, lightly, timm and torchvision, and the features of each.

    python foreign_writers.py FOLDER

Run by `test_foreign_weights.py` in an environment of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

VIT: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 64}
HF_VIT = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 16},
    **{"intermediate_size": 192, "image_size": 64, "layer_norm_eps": 1e-6},
}
SIZES = {"hf_swin": 224}  # px; of all others 64


def moved(model: Any) -> Any:
    """Return the model with no weight or statistic where it starts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or "gamma" in name:
                nn.init.uniform_(parameter, 0.5, 1.0)
            elif parameter.ndim < 2:
                parameter.add_(0.1 * torch.rand_like(parameter))
            elif "position" in name or "cls_token" in name or "bias_table" in name:
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def images(name: str) -> Tensor:
    size = SIZES.get(name, 64)
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(7))


def write_transformers(out: Path) -> dict[str, Tensor]:
    import transformers as hf

    vit, classifier = (
        moved(kind(hf.ViTConfig(**HF_VIT))) for kind in (hf.ViTModel, hf.ViTForImageClassification)
    )
    resnet = moved(hf.ResNetForImageClassification(hf.ResNetConfig()))
    convnext = moved(hf.ConvNextModel(hf.ConvNextConfig()))
    swin = moved(hf.SwinModel(hf.SwinConfig()))
    models = {"hf_vit": vit, "hf_vit_classifier": classifier, "hf_resnet": resnet}
    models |= {"hf_convnext": convnext, "hf_swin": swin}
    for name, model in models.items():
        model.save_pretrained(out / name)
    torch.save(vit.state_dict(), out / "hf_vit_in_memory.pth")
    return {
        "hf_vit": vit(images("")).last_hidden_state[:, 0],
        "hf_vit_in_memory.pth": vit(images("")).last_hidden_state[:, 0],
        "hf_vit_classifier": classifier.vit(images("")).last_hidden_state[:, 0],
        "hf_resnet": resnet.resnet(images("")).pooler_output.flatten(1),
        "hf_convnext": convnext(images("")).pooler_output,
        "hf_swin": swin(images("hf_swin")).pooler_output,
    }


def write_lightly(out: Path) -> dict[str, Tensor]:
    from lightly.models import ResNetGenerator
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.heads import SimCLRProjectionHead

    def method(backbone: nn.Module, width: int) -> nn.Module:
        """Return a module as lightly's examples have it."""
        made = nn.Module()
        made.backbone, made.projection_head = backbone, SimCLRProjectionHead(width, width, 128)
        return made

    resnet = nn.Sequential(*list(moved(torchvision.models.resnet50()).children())[:-1])
    vit = MaskedVisionTransformerTIMM(moved(timm.create_model("vit_small_patch16_224", **VIT)))
    cifar: Any = moved(ResNetGenerator("resnet-50"))
    cifar_backbone = nn.Sequential(*list(cifar.children())[:-1], nn.AdaptiveAvgPool2d(1))
    made = {"lightly.ckpt": method(resnet, 2048), "lightly_vit.ckpt": method(vit, 48)}
    made["lightly_cifar.ckpt"] = method(cifar_backbone, 2048)
    benchmark: Any = moved(ResNetGenerator("resnet-18"))
    benchmark = nn.Sequential(*list(benchmark.children())[:-1], nn.AdaptiveAvgPool2d(1))
    made["lightly_cifar_benchmark.ckpt"] = method(benchmark, 512)
    for name, model in made.items():
        torch.save({"epoch": 1, "state_dict": model.state_dict()}, out / name)
    x = F.relu(cifar.bn1(cifar.conv1(images(""))))
    x = cifar.layer4(cifar.layer3(cifar.layer2(cifar.layer1(x))))
    features = {"lightly.ckpt": resnet.eval()(images("")).flatten(1)}
    return features | {
        "lightly_vit.ckpt": vit.eval()(images("")),
        "lightly_cifar.ckpt": x.mean((2, 3)),
        "lightly_cifar_benchmark.ckpt": benchmark(images("")).flatten(1),
    }


def write_plain(out: Path) -> dict[str, Tensor]:
    made: dict[str, Any] = {
        "timm_resnet50.pth": moved(timm.create_model("resnet50")),
        "timm_convnext.pth": moved(timm.create_model("convnext_tiny")),
        "timm_vit.pth": moved(timm.create_model("vit_small_patch16_224", img_size=64)),
    }
    features = {}
    for name, body in made.items():
        torch.save(body.state_dict(), out / name)
        features[name] = body.forward_head(body.forward_features(images("")), pre_logits=True)
    for name, head in (("resnet50", "fc"), ("swin_t", "head")):
        model = moved(getattr(torchvision.models, name)())
        torch.save(model.state_dict(), out / f"torchvision_{name}.pth")
        setattr(model, head, nn.Identity())
        features[f"torchvision_{name}.pth"] = model(images(""))
    return features


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    with torch.no_grad():
        written = write_plain(folder) | write_lightly(folder) | write_transformers(folder)
    torch.save(written, folder / "features.pth")
