"""The recipe: every setting of an experiment, one dataclass per section of the YAML file.

A recipe is a YAML file with the sections below; `parse_recipe` (in `parse.py`) reads it together with overrides
from the command line (`--section.key value`). This module only says which keys there are, what they mean and
which values they take: a number's range stands in its type.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from dist_train.ranges import AT_LEAST_1, FINITE, NOT_NEGATIVE, POSITIVE, SHARE, STRENGTH, Range

DataDevice = Literal["auto", "cpu", "gpu"]
AutoAugment = Literal["none", "randaugment", "trivialaugment"]
Head = Literal["cls", "mean", "ifa", "last_n", "all_layers", "attentive"]
HeadInit = Literal["reference", "zero", "default", "mean", "last"]
Compile = Literal["auto", "none", "kernels", "graphs"]
OptimName = Literal["sgd", "adamw"]
Schedule = Literal["constant", "constant_epoch", "cosine"]
LrScaling = Literal["none", "linear", "sqrt"]
Precision = Literal["auto", "float32", "tf32", "bf16", "bf16_autocast", "fp16"]
ZeroStage = Literal[0, 1, 2, 3]


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
    feature_cache: str | None = None
    """Folder, shared by all hosts, for what a backbone that is frozen (model.freeze backbone) gives for each image: it
    is computed once, in the arithmetic of evaluation, and from then on heads train on it at thousands of samples a
    second. Found again by set, backbone and its weights. Nothing may augment the images. None: every image is decoded
    and run through the backbone in every epoch."""
    image_size: Annotated[int, Range(1, 2**15)] = 128
    """Side of the square image that the model sees, pixels; see crop and eval_crop for how other shapes get there."""
    crop_margin: Annotated[int, Range(0, 2**15)] = 32
    """With crop squash: training images are squashed to squares of image_size + crop_margin and randomly cropped to
    image_size."""
    crop: Literal["squash", "random_resized"] = "squash"
    """What training sees of an image. squash: as crop_margin says. random_resized: a box of random area and aspect,
    resized to image_size (torchvision's RandomResizedCrop)."""
    crop_scale: Annotated[tuple[float, float], Range(0, 1, above=True)] = (0.08, 1.0)
    """With crop random_resized: least and largest share of the image's area."""
    crop_ratio: Annotated[tuple[float, float], POSITIVE] = (0.75, 4 / 3)
    """With crop random_resized: least and largest width of the box by its height."""
    eval_crop: Literal["squash", "center"] = "squash"
    """What evaluation and prediction see. squash: the whole image, squashed to image_size. center: the middle of the
    image resized with its aspect kept (torchvision's Resize and CenterCrop)."""
    eval_crop_pct: Annotated[float, Range(0, 1, above=True)] = 0.875
    """With eval_crop center: the shorter side is resized to image_size divided by this."""
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
    auto_augment: AutoAugment = "none"
    """Random operations on training images before the colour jitter, as torchvision has them. randaugment:
    randaugment_ops of 14 operations, all at randaugment_magnitude; trivialaugment: one at a random magnitude."""
    randaugment_ops: Annotated[int, Range(1, 14)] = 2
    """With auto_augment randaugment: operations for each image."""
    randaugment_magnitude: Annotated[int, Range(0, 30)] = 9
    """With auto_augment randaugment: their strength, 0 to 30."""
    grey: Annotated[float, STRENGTH] = 0.0
    """Share of the training images that lose their colours."""
    blur: Annotated[float, STRENGTH] = 0.0
    """Share of the training images that are blurred (torchvision's GaussianBlur, kernel of 9 pixels)."""
    blur_sigma: Annotated[tuple[float, float], POSITIVE] = (0.1, 2.0)
    """Least and largest standard deviation of the blur, pixels."""
    erasing: Annotated[float, STRENGTH] = 0.0
    """Share of the training images of which a box becomes data.mean (torchvision's RandomErasing: 2 to 33 % of the
    area, height 0.3 to 3.3 times the width)."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.0
    """Alpha of mixup (Zhang et al. 2018): neighbours in the batch are blended in a ratio from Beta(alpha, alpha); 0 is
    off. With cutmix too, each pair takes one of the two with probability one half."""
    cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
    """Alpha of CutMix (Yun et al. 2019): neighbours exchange a box whose share of the area is from Beta(alpha, alpha);
    0 is off."""
    mean: Annotated[tuple[float, float, float] | Literal["auto"], FINITE] = (0.5, 0.5, 0.5)
    """Subtracted from RGB in [0, 1]. auto: what the starting weights were trained with, 0.5 without any."""
    std: Annotated[tuple[float, float, float] | Literal["auto"], POSITIVE] = (0.5, 0.5, 0.5)
    """Divides RGB after the mean is subtracted; auto as for mean."""
    tokenizer: str = "bert-base-uncased"
    """WordPiece tokenizer for tags: a name on the hub, or a vocab.txt file; or `tags`: one token for each of the
    tag_vocabulary most frequent tags of the train split. Read only if model.text_tokens > 0."""
    tag_order: Literal["given", "shuffle", "frequency"] = "given"
    """Order of a sample's tags before they are cut at model.text_tokens: as given; in training shuffled again for each
    sample and epoch, as given in evaluation; or the most frequent of the train split first."""
    tag_vocabulary: Annotated[int, AT_LEAST_1] = 4096
    """Most frequent tags that data.labels `tags`, data.tokenizer `tags` and data.tag_order `frequency` know; the run
    folder's tags.txt."""
    tag_min_count: Annotated[int, AT_LEAST_1] = 1
    """Tags on fewer samples of the train split than this are not among them."""
    labels: Literal["class", "tags"] = "class"
    """What the model predicts. class: the one class of an image. tags: which of the tag_vocabulary most frequent tags
    of the train split an image has, each on its own (multi-label); an image with none of them counts as one without."""
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
    """One of resnet18, resnet50, efficientnet_b0, or vit_{tiny,small,base,large}_patch{N}; or any model of timm by
    timm's name for it, with the tag of its pretrained weights behind a dot or without (`dist-train models` lists
    them)."""
    head: Head = "cls"
    """What makes the logits. cls: a linear layer on the last [CLS] token (pooled features for a CNN). The others read
    every block of a ViT. mean: a linear layer on the mean of the blocks' [CLS]; ifa: on a learned mixture of them;
    last_n: on those of the last four blocks side by side; all_layers: on every block's [CLS] and average of the
    patches side by side; attentive: a learned query attends over the same."""
    head_init: HeadInit = "reference"
    """Start of the classifier: zero, PyTorch's default, or as in the reference (zero for cls, default for the others).
    `mean` is the default, but the aggregation of ifa, and the attention of attentive, start as the mean over the
    blocks, with bias 0: at PyTorch's random start a negative bias of ifa puts nearly every channel behind the ReLU, and
    a model from scratch hardly learns for an epoch. `last` is the default, but the aggregation of ifa starts as the
    last block alone, which is what the CLS head reads."""
    text_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """Tokens of tags the model reads beside the image (a ViLT); 0 is vision only. The paper has 16, 32, 64."""
    mask_padding: bool = True
    """Keep padding tokens out of attention; false reproduces the reference, where they take part."""
    weights: str = "none"
    """Starting weights: none, hub (timm's, of the tag in model.backbone, else the paper's or timm's default), hub:TAG,
    a file (.safetensors, .pth/.bin, .npz), a folder in the format of timm's hub, or the folder of a run (its best
    checkpoint on val, else its last) or of a checkpoint; with `:ema` behind the folder its averaged weights. The
    classifier comes along if the classes are the same."""
    pos_resize: Literal["timm", "reference"] = "timm"
    """Resampling of pretrained position embeddings: timm's (bicubic, antialiased) or the reference's (bilinear,
    aligned corners). A backbone under timm's own name always has timm's."""
    dropout: Annotated[float, SHARE] = 0.0
    """Dropout inside the transformer blocks; the reference trains with 0.1. 0 is none, also of timm's models that have
    some by default."""
    drop_path: Annotated[float, SHARE] = 0.0
    """Probability with which the residual branches of the last block are skipped for a sample; it rises linearly from 0
    at the first (stochastic depth, Huang et al. 2016). 0 is none; timm's Swin, for one, has 0.1 by default."""
    freeze: str = "none"
    """What keeps its starting weights, in evaluation mode: none; a number n, the embedding or stem and the first n
    blocks or, as timm groups them, layers; or backbone, all but the head (and the text embeddings)."""
    lora: Annotated[int, NOT_NEGATIVE] = 0
    """Rank of LoRA's adapters (pip install 'dist-train[lora]'): the backbone keeps its weights, and beside its linear
    layers matrices of this rank learn what is added; the head trains as always. 8 is usual, 0 is off. Export and
    model.weights merge them into the weights."""
    lora_alpha: Annotated[int, NOT_NEGATIVE] = 0
    """What the adapters add is multiplied by lora_alpha / lora. 0: twice the rank."""
    lora_targets: Literal["all", "attention"] = "all"
    """Layers with adapters: all the linear layers of the blocks, or those of their attention alone."""
    checkpoint_blocks: bool = False
    """Compute blocks again in the backward pass instead of keeping their activations; same results. Not with batch
    norms."""
    compile: Compile = "auto"
    """What runs the model. none: PyTorch's operators one by one. kernels: those of torch.compile, which take up to a
    minute to build. graphs: kernels, and forward and backward pass of a micro-batch launched as one CUDA graph, so that
    a small batch costs what the GPU needs and not what Python does; one GPU at ZeRO 0 without checkpoint_blocks. auto:
    on a GPU graphs where they can be, else kernels (none with ZeRO 3, which they do not go with); on the CPU none."""
    norm_eps: Annotated[float, POSITIVE] = 1e-6
    """Epsilon of the layer norms; the reference has 1e-12, which underflows in fp16. A backbone under timm's own name
    keeps its own."""


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
    """Whether weight_decay also holds for biases, norms, the [CLS] token, position embeddings and what else timm leaves
    out."""
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Rates fall by this factor per layer from the head (1) over the last block or layer to the embedding or stem; text
    embeddings, which start untrained, learn at the head's. Layers are timm's groups. 1: all at one rate."""
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
    """Share of the target spread evenly over all classes, or over all tags (timm's rule for its BCE)."""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """Weigh the loss of a sample by its class: by 1 / n, n the class's images over all splits (the manifest counts no
    others), or by 1 / effective number (1 - beta^n) / (1 - beta) (Cui et al. 2019). The mean over the images is 1."""
    class_weights_beta: Annotated[float, SHARE] = 0.999
    """Beta of class_weights effective, in [0, 1): towards 0 all classes weigh the same, towards 1 as with inverse."""
    positive_weight: Annotated[float, POSITIVE] = 1.0
    """With data.labels tags: weight of the loss of a tag that an image has, against that of a tag that it has not."""
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
    micro_batch_size: Annotated[int | Literal["auto"], NOT_NEGATIVE] = 0
    """Samples of one forward pass on one rank; accumulation follows. 0: the whole share of the rank. auto: the largest
    divisor of the share that fits into the memory of every rank's device, found at the start of a run and written into
    its recipe.yaml as a number; not with batch norms that train, whose statistics are those of a micro-batch."""
    ema: Annotated[float, SHARE] = 0.0
    """Decay per step of averaged weights that are evaluated and exported beside the raw ones, as 0.9998; not with ZeRO
    3. In the first steps the decay is (1 + step) / (10 + step), so that the start is soon forgotten. 0: none."""
    channels_last: bool = False
    """Keep a CNN's images and activations with the channels innermost, which its convolutions may be faster at."""
    eval_batch_size: Annotated[int, AT_LEAST_1] = 64
    """Samples of one evaluation pass on one rank."""
    eval_every: Annotated[int, AT_LEAST_1] = 1
    """Epochs between two evaluations on val (the last epoch is always evaluated)."""
    threshold: Annotated[float, Range(0, 1)] = 0.5
    """With data.labels tags: probability from which on a tag counts as predicted in an evaluation. Precision, recall
    and F1 are told for it, and for the thresholds, one a tag, that give the highest F1 on val."""
    monitor: Literal["auto", "top1", "top5", "class_mean", "loss"] = "auto"
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
    noise_every: Annotated[int, NOT_NEGATIVE] = 0
    """Estimate the gradient noise scale, the batch size beyond which more samples in a step gain little, from every
    n-th step. Logged as noise_scale (of all parameters; needs several ranks or micro-batches) and noise_scale_norms (of
    the layer norms alone), over the last 100 measured steps since the start of the process, with the ends of 95 %
    intervals. A measured step runs without torch.compile, and none as a CUDA graph. 0: never."""
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
    products and all that lies between them, the tokens of a ViT included; sums of norms, and the loss, in float32 (at
    ZeRO 0 a backbone under timm's own name has its tokens in float32 too).
    bf16_autocast: the same, but tokens and norms in float32 by the rules of torch.autocast (ZeRO 0 only). fp16: with a
    loss scale that follows overflows; needs a GPU. auto: on GPUs that have it bf16_autocast at ZeRO 0 and bf16 above,
    else float32. What the matrix products really were is measured at the start of a run, which ends where that is not
    what is said here."""
    zero_stage: Annotated[ZeroStage, Range(0, 3)] = 0
    """ZeRO: 0 replicates everything, 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
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
