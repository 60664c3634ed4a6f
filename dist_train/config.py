"""The recipe: every setting of an experiment, one dataclass per section of the YAML file.

A recipe is a YAML file with the sections below; `parse_recipe` (in `parse.py`) reads it together with overrides
from the command line (`--section.key value`). This module only says which keys there are, what they mean and
which values they take: a number's range stands in its type.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from dist_train.ranges import AT_LEAST_1, FINITE, NOT_NEGATIVE, POSITIVE, SHARE, STRENGTH, Range

TagOrder = Literal["given", "shuffle", "frequency"]
DataDevice = Literal["auto", "cpu", "gpu"]
Head = Literal["cls", "ifa"]
HeadInit = Literal["reference", "zero", "default", "mean"]
PosResize = Literal["timm", "reference"]
Compile = Literal["auto", "none", "kernels", "graphs"]
OptimName = Literal["sgd", "adamw"]
Schedule = Literal["constant", "constant_epoch", "cosine"]
LrScaling = Literal["none", "linear", "sqrt"]
ClassWeights = Literal["none", "inverse", "effective"]
Precision = Literal["auto", "float32", "tf32", "bf16", "bf16_autocast", "fp16"]
Monitor = Literal["auto", "top1", "top5", "class_mean", "loss"]
ZeroStage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "parameters"]


@dataclass
class DataConfig:
    """Where samples come from and how an image becomes a tensor."""

    shards: str = "data/demo"
    """Folder or URL (s3://, gs://, https://, any that fsspec knows) of the shard set, where manifest.json lies. Or
    images: a folder of class folders, or a CSV file (path,class[,split][,tags]). Of these a set is built once, at the
    size that the recipe needs, into the folder `sets` of data.cache; it is used again until the images change."""
    cache: str | None = None
    """Folder for the shards of a set at a URL, shared by the ranks of a node, and for sets built of images (in `sets`).
    None: ~/.cache/dist-train, with the former in `shards`."""
    cache_gb: Annotated[float, POSITIVE] = 50.0
    """Largest size of the shards from a URL in that folder, 10**9 bytes; those no longer needed make room. Sets built
    of images do not count, and stay until you delete them."""
    digest: str | None = None
    """Expected digest of the shard set's manifest; a different set is refused. None accepts any."""
    image_size: Annotated[int, Range(1, 2**15)] = 128
    """Side of the square image that the model sees, pixels; other shapes are squashed to it."""
    crop_margin: Annotated[int, Range(0, 2**15)] = 32
    """Training images are squashed to squares of image_size + crop_margin and randomly cropped to image_size."""
    flip: bool = True
    """Flip training images left-right with probability one half."""
    brightness: Annotated[float, STRENGTH] = 0.1
    """Brightness factor of training images is uniform in [1 - b, 1 + b]. This and the next three are torchvision's
    ColorJitter, but always in the order brightness, contrast, saturation, hue."""
    contrast: Annotated[float, STRENGTH] = 0.1
    """Contrast factor of training images is uniform in [1 - c, 1 + c]."""
    saturation: Annotated[float, STRENGTH] = 0.1
    """Saturation factor of training images is uniform in [1 - s, 1 + s]."""
    hue: Annotated[float, Range(0, 0.5)] = 0.1
    """Hue shift of training images is uniform in [-h, h], in turns of the colour circle (0.1 = 36 degrees)."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.0
    """Alpha of mixup (Zhang et al. 2018): neighbours in the batch are blended in a ratio from Beta(alpha, alpha); 0 is
    off. With cutmix too, each pair takes one of the two with probability one half."""
    cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
    """Alpha of CutMix (Yun et al. 2019): neighbours exchange a box whose share of the area is from Beta(alpha, alpha);
    0 is off."""
    mean: Annotated[tuple[float, float, float], FINITE] = (0.5, 0.5, 0.5)
    """Subtracted from RGB in [0, 1]."""
    std: Annotated[tuple[float, float, float], POSITIVE] = (0.5, 0.5, 0.5)
    """Divides RGB after the mean is subtracted."""
    tokenizer: str = "bert-base-uncased"
    """WordPiece tokenizer for tags: a name on the hub, or a vocab.txt file; or `tags`: one token for each of the
    tag_vocabulary most frequent tags of the train split. Read only if model.text_tokens > 0."""
    tag_order: TagOrder = "given"
    """Order of a sample's tags before they are cut at model.text_tokens: as given; in training shuffled again for each
    sample and epoch, as given in evaluation; or the most frequent of the train split first."""
    tag_vocabulary: Annotated[int, AT_LEAST_1] = 4096
    """Most frequent tags that data.tokenizer `tags` and data.tag_order `frequency` know; the run folder's tags.txt."""
    streams: Annotated[int, NOT_NEGATIVE] = 0
    """Contiguous ranges an epoch is read in at once; must divide train.batch_size. A rank reads only its part of
    the data where the number of ranks divides the streams. 0: the largest divisor up to 64, or batch_size / 8."""
    shuffle_window: Annotated[int, AT_LEAST_1] = 4096
    """Samples of a stream are shuffled within windows of this many."""
    device: DataDevice = "auto"
    """Where DALI decodes and augments; auto: the GPU if there is one."""
    threads: Annotated[int, NOT_NEGATIVE] = 0
    """DALI's decode threads per rank. 0: the cores of this machine divided by its ranks."""
    prefetch: Annotated[int, AT_LEAST_1] = 2
    """Finished batches that wait for the model; two more are being decoded."""
    max_bad_samples: Annotated[int, NOT_NEGATIVE] = 16
    """Damaged or undecodable samples that a run may meet over all ranks (and leave out, with a record) before it ends
    with an error."""
    max_pixels: Annotated[int, AT_LEAST_1] = 89_478_485
    """An image that announces more pixels than this is left out before it is decoded; the default is Pillow's limit."""


@dataclass
class ModelConfig:
    """Backbone, head, text, and the weights it starts from."""

    backbone: str = "vit_base_patch16"
    """One of resnet18, resnet50, efficientnet_b0, or vit_{tiny,small,base,large}_patch{N}."""
    head: Head = "cls"
    """cls: a linear layer on the last [CLS] token (pooled features for a CNN); ifa: on the [CLS] of every block."""
    head_init: HeadInit = "reference"
    """Start of the classifier: zero, PyTorch's default, or as in the reference (zero for cls, default for ifa). `mean`
    is the default, but the aggregation of ifa starts as the mean over the blocks with bias 0: at PyTorch's random start
    a negative bias puts nearly every channel behind the ReLU, and a model from scratch hardly learns for an epoch."""
    text_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """Tokens of tags the model reads beside the image (a ViLT); 0 is vision only. The paper has 16, 32, 64."""
    mask_padding: bool = True
    """Keep padding tokens out of attention; false reproduces the reference, where they take part."""
    weights: str = "none"
    """Starting weights: none, hub (timm's, the paper's tag), hub:TAG, a file (.safetensors, .pth/.bin, .npz), or the
    folder of a run (its best checkpoint on val, else its last) or of a checkpoint; with `:ema` behind the folder its
    averaged weights. The classifier comes along if the classes are the same."""
    pos_resize: PosResize = "timm"
    """Resampling of pretrained position embeddings: timm's (bicubic, antialiased) or the reference's (bilinear,
    aligned corners)."""
    dropout: Annotated[float, SHARE] = 0.0
    """Dropout inside the transformer blocks; the reference trains with 0.1."""
    drop_path: Annotated[float, SHARE] = 0.0
    """Probability with which the residual branches of the last block are skipped for a sample; it rises linearly from 0
    at the first (stochastic depth, Huang et al. 2016)."""
    freeze: str = "none"
    """What keeps its starting weights, in evaluation mode: none; a number n, the embedding and the first n blocks of a
    ViT; or backbone, all but the head (and the text embeddings)."""
    checkpoint_blocks: bool = False
    """Compute a ViT's blocks again in the backward pass instead of keeping their activations; same results."""
    compile: Compile = "auto"
    """What runs the model. none: PyTorch's operators one by one. kernels: those of torch.compile, which take up to a
    minute to build. graphs: kernels, and forward and backward pass of a micro-batch launched as one CUDA graph, so that
    a small batch costs what the GPU needs and not what Python does; one GPU at ZeRO 0 without checkpoint_blocks. auto:
    on a GPU graphs where they can be, else kernels (none with ZeRO 3, which they do not go with); on the CPU none."""
    norm_eps: Annotated[float, POSITIVE] = 1e-6
    """Epsilon of the layer norms; the reference has 1e-12, which underflows in fp16."""


@dataclass
class OptimConfig:
    """Optimizer, learning-rate schedule and loss."""

    name: OptimName = "sgd"
    """SGD with momentum (the paper's), or AdamW."""
    lr: Annotated[float, NOT_NEGATIVE] = 0.001
    """Learning rate at its highest."""
    momentum: Annotated[float, SHARE] = 0.9
    """SGD's momentum."""
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decoupled for AdamW, added to the gradient for SGD."""
    decay_all: bool = False
    """Whether weight_decay also holds for biases, norms, the [CLS] token and position embeddings."""
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    """A ViT's rates fall by this factor per layer from the head (1) over the last block to the embedding; text
    embeddings, which start untrained, learn at the head's. 1: all at one rate."""
    schedule: Schedule = "cosine"
    """constant_epoch: divided by decay_factor after every decay_epochs; cosine: half a cosine to 0, per step."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps of linear warm-up from 0, for every schedule."""
    decay_epochs: Annotated[int, AT_LEAST_1] = 20
    """For constant_epoch: epochs between two decays."""
    decay_factor: Annotated[float, POSITIVE] = 3.0
    """For constant_epoch: what the rate is divided by."""
    lr_scaling: LrScaling = "none"
    """Multiply lr by train.batch_size / lr_reference_batch, or by its square root; the paper does neither."""
    lr_reference_batch: Annotated[int, AT_LEAST_1] = 64
    """Batch size at which lr_scaling changes nothing."""
    label_smoothing: Annotated[float, SHARE] = 0.0
    """Share of the target spread evenly over all classes."""
    class_weights: ClassWeights = "none"
    """Weigh the loss of a sample by its class: by 1 / n, n the class's images over all splits (the manifest counts no
    others), or by 1 / effective number (1 - beta^n) / (1 - beta) (Cui et al. 2019). The mean over the images is 1."""
    class_weights_beta: Annotated[float, SHARE] = 0.999
    """Beta of class_weights effective, in [0, 1): towards 0 all classes weigh the same, towards 1 as with inverse."""
    clip_norm: Annotated[float, NOT_NEGATIVE] = 0.0
    """Gradients are scaled down to this global L2 norm; 0 does not clip."""


@dataclass
class TrainConfig:
    """The run: how long, how many samples per step, what is written where."""

    run: str = "runs/demo"
    """Run folder."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """The one seed of order, augmentation and initial weights."""
    epochs: Annotated[int, AT_LEAST_1] = 50
    """Passes over the train split."""
    batch_size: Annotated[int, Range(1, 2**24)] = 64
    """Global batch: samples per optimizer step, over all ranks (the paper's mini-batch)."""
    micro_batch_size: Annotated[int, NOT_NEGATIVE] = 0
    """Samples of one forward pass on one rank; accumulation follows. 0: the whole share of the rank."""
    ema: Annotated[float, SHARE] = 0.0
    """Decay per step of averaged weights that are evaluated and exported beside the raw ones, as 0.9998; not with ZeRO
    3. In the first steps the decay is (1 + step) / (10 + step), so that the start is soon forgotten. 0: none."""
    channels_last: bool = False
    """Keep a CNN's images and activations with the channels innermost, which its convolutions may be faster at."""
    eval_batch_size: Annotated[int, AT_LEAST_1] = 64
    """Samples of one evaluation pass on one rank."""
    eval_every: Annotated[int, AT_LEAST_1] = 1
    """Epochs between two evaluations on val (the last epoch is always evaluated)."""
    monitor: Monitor = "auto"
    """What decides which evaluation on val is the best: top1, top5, class_mean (of the classes' own top-1) or loss.
    auto: top1, and of a model that predicts tags the mAP."""
    patience: Annotated[int, NOT_NEGATIVE] = 0
    """End the run after this many evaluations on val without a better one; 0: never. The learning rate does not know:
    it follows train.epochs."""
    log_every: Annotated[int, AT_LEAST_1] = 10
    """Steps between two logged steps."""
    stop_after_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Save and end after this many optimizer steps of the whole run, as if by SIGTERM; 0: run to the end."""
    keep_checkpoints: Annotated[int, AT_LEAST_1] = 2
    """Newest checkpoints kept, beside the best."""
    timeout_s: Annotated[float, Range(1, 10**8)] = 1800.0  # three years: more is beyond what collectives can count
    """Longest that ranks wait for each other, seconds: a rank that died ends the job at once, one that is silent or
    hangs within this time. Must be longer than anything that rank 0 does alone, such as writing weights."""
    skip_bad_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps whose loss may be NaN or infinite: they change no weights and are logged; one more ends the run."""
    profile_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Optimizer steps to trace with torch's profiler, after the first ten; rank 0 writes RUN/trace.json."""
    wandb_project: str | None = None
    """Also send the metrics to this Weights & Biases project (pip install wandb; WANDB_* variables apply). It stays one
    run there when it is resumed, offline too."""


@dataclass
class DeepSpeedConfig:
    """What the DeepSpeed engine does with the model."""

    precision: Precision = "auto"
    """Arithmetic of forward and backward pass; weights, their gradients at ZeRO 0, and the optimizer's step are float32
    in any case. float32: exact, on GPUs too. tf32: float32 whose matrix products a GPU rounds to 10 bits. bf16: matrix
    products and all that lies between them, the tokens of a ViT included; sums of norms, and the loss, in float32.
    bf16_autocast: the same, but tokens and norms in float32 by the rules of torch.autocast (ZeRO 0 only). fp16: with a
    loss scale that follows overflows; needs a GPU. auto: on GPUs that have it bf16_autocast at ZeRO 0 and bf16 above,
    else float32. What the matrix products really were is measured at the start of a run, which ends where that is not
    what is said here."""
    zero_stage: Annotated[ZeroStage, Range(0, 3)] = 0
    """ZeRO: 0 replicates everything, 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    offload: Offload = "none"
    """Keep in main memory, and step there: optimizer states (ZeRO 1 to 3); parameters and optimizer states (ZeRO 3)."""
    config: str | None = None
    """A DeepSpeed JSON file whose keys are added; keys that the recipe decides (batch, precision, ...) may differ
    from it in nothing. With it DeepSpeed's engine makes the steps at ZeRO 0 too, which costs some time."""


@dataclass
class Recipe:
    """One experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)


SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "deepspeed": DeepSpeedConfig,
}


def recipe_to_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The values of all keys by section, as YAML and JSON have them: with lists for tuples."""
    return {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in entries.items()}
        for section, entries in asdict(recipe).items()
    }


def recipe_from_dict(values: dict[str, dict[str, Any]]) -> Recipe:
    """The inverse. Keys that are not there have their default."""

    def section(name: str) -> Any:
        entries = values[name].items()
        return SECTIONS[name](**{key: tuple(value) if isinstance(value, list) else value for key, value in entries})

    return Recipe(**{name: section(name) for name in SECTIONS})
