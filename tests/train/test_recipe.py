from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qvit.data.loader import Batches
from qvit.data.sources import ImageSets
from qvit.errors import ConfigError, DataError
from qvit.models.spec import describe
from qvit.train import methods
from qvit.train.methods import open_images
from qvit.train.options import Options
from qvit.train.recipe import Hyperparameters, builtin_recipes, load_recipe

MINIMAL = "full_precision: {epochs: 1, batch_size: 2, lr: 1e-3}\nquantized: {epochs: 1, batch_size: 2, lr: 2e-4}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipes_load(name: str) -> None:
    assert load_recipe(name).quantized.epochs > 0


def test_imagenet_recipe_is_the_published_one() -> None:
    quantized = load_recipe("deit_imagenet").quantized
    assert (quantized.epochs, quantized.batch_size, quantized.lr) == (300, 512, 2e-4)
    assert (quantized.optimizer, quantized.weight_decay, quantized.warmup_epochs) == ("lamb", 0.0, 0.0)


def test_exponents_without_a_point_are_numbers(file: Path) -> None:
    assert load_recipe(str(file)).full_precision.lr == 0.001


def test_set_changes_and_adds_entries(file: Path) -> None:
    recipe = load_recipe(str(file), ["quantized.epochs=7", "model_args.depth=3", "quantized.lr=3e-3"])
    assert recipe.quantized.epochs == 7
    assert recipe.quantized.lr == 0.003
    assert recipe.model_args == {"depth": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("quantized.epoch=5", "did you mean 'epochs'"),
        ("augmentation.input_size=8", "Unknown entry 'input_size' in augmentation"),
        ("augmentation.scale=0.5", "timm cannot augment images with scale '0.5': TypeError, "),
        ("quantized.optimizer_args={eps: x}", "lamb does not take eps 'x': "),
        ("augmentation.hflop=1", "did you mean 'hflip'"),
        ("quantized.augmentation.hflop=1", "in quantized.augmentation: did you mean 'hflip'"),
        ("quantized.augmentation.scale=0.5", "timm cannot augment images with scale '0.5'"),
        ("quantized.augmentation=1", "quantized.augmentation must be a mapping"),
        ("quantized.distillation=warm", "distillation must be hard or soft"),
        ("quantized.reconstruct_first=1", "reconstruct_first must be true or false"),
        ("quantized.lr=fast", "lr must be a number"),
        ("quantized.ema_decay=1", "ema_decay must be below 1"),
        ("quantized.clip_grad=-1", "clip_grad must be a number from 0 up"),
        ("quantized.guided_decay=0.5", "guided_decay must be true or false"),
        ("quantized.track_oscillation=1", "track_oscillation must be true or false"),
        ("quantized.guided_layers=2", "guided_layers must be a list of layers such as .0, -1., or null"),
        ("quantized.guided_layers=[]", "guided_layers must be a list"),
        ("quantized.weight_init=max", "weight_init must be minimum_error or lsq"),
        ("quantized.rectifier_init=keep", "rectifier_init must be teacher or unit"),
        ("quantized.optimizer=adamm", "no optimizer 'adamm': did you mean adam"),
        ("quantized.optimizer_args.epps=1", "Unknown entry 'epps' in optimizer_args: did you mean 'eps'"),
        ("quantized.optimizer_args=3", "optimizer_args must be a mapping"),
        ("quantized.repeated_augmentation=1.5", "repeated_augmentation must be a whole number from 0 up"),
        ("quantized.epochs=0", "epochs must be a whole number from 1 up"),
        ("quantized.epochs", "NAME=VALUE"),
        ("quantized.lr.x=1", "lr is a single value"),
        ("quantized=3", "quantized must be a mapping"),
        ("schedule.epochs=3", "Unknown entry 'schedule'"),
    ],
)
def test_wrong_change_is_explained(file: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(file), [change])


def test_absent_recipe_names_the_builtin_ones() -> None:
    with pytest.raises(ConfigError, match="cifar10, cifar10_small, deit_imagenet, digits"):
        load_recipe("nowhere.yaml")


def test_broken_yaml_is_named(file: Path) -> None:
    file.write_text("full_precision: {epochs: [1}")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(str(file))


@pytest.mark.parametrize("section", ["full_precision", "quantized"])
def test_one_section_is_enough(file: Path, section: str) -> None:
    lines = dict(zip(("full_precision", "quantized"), MINIMAL.splitlines(), strict=True))
    file.write_text(lines.pop(section))
    recipe = load_recipe(str(file))
    assert recipe.hyperparameters(section).epochs == 1  # type: ignore[arg-type]
    (other,) = lines
    with pytest.raises(ConfigError, match=f"The recipe has no {other}, which this run uses"):
        recipe.hyperparameters(other)  # type: ignore[arg-type]
    assert load_recipe(str(file), [f"{other}.{entry}" for entry in ("epochs=2", "batch_size=4", "lr=1")]).to_dict()
    file.write_text("model_args: {depth: 2}")
    assert load_recipe(str(file)).model_args == {"depth": 2}


def test_two_entries_of_one_name_are_refused(file: Path) -> None:
    file.write_text(MINIMAL + "full_precision: {epochs: 9, batch_size: 2, lr: 1e-3}\n")
    with pytest.raises(ConfigError, match="there are two entries 'full_precision'"):
        load_recipe(str(file))
    file.write_text("quantized: {epochs: 1, batch_size: 2, lr: 1e-3, epochs: 3}")
    with pytest.raises(ConfigError, match="there are two entries 'epochs'"):
        load_recipe(str(file))


@pytest.mark.parametrize("optimizer", ["lamb", "AdamW", "lookahead_adam", "sgd", "muon"])
def test_every_optimizer_of_timm_is_known(file: Path, optimizer: str) -> None:
    assert load_recipe(str(file), [f"quantized.optimizer={optimizer}"]).quantized.optimizer == optimizer


ENTRIES = [f"quantized.{field.name}" for field in fields(Hyperparameters)]
ENTRIES += ["quantized.optimizer_args.eps", "quantized.optimizer_args.betas", "full_precision", "quantized"]
ENTRIES += [f"preprocessing.{name}" for name in ("mean", "std")] + ["model_args", "augmentation", "preprocessing"]
ENTRIES += [f"augmentation.{name}" for name in ("scale", "hflip", "color_jitter", "interpolation", "auto_augment")]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_value_that_cannot_be_meant_is_one_sentence(file: Path, entry: str) -> None:
    for value in ("x", "-1", "[]", "{a: 1}", "null", ".nan", "true", "[a, b]"):
        said = f"Recipe {file}: accepted."
        try:
            load_recipe(str(file), [f"{entry}={value}"])
        except ConfigError as error:
            said = str(error)
        assert said.startswith(f"Recipe {file}: ")
        assert said.endswith((".", "?"))
        assert len(said.splitlines()) == 1


def test_what_trains_can_be_exported(image_folder: Callable[..., Path]) -> None:
    folder = image_folder()
    for change, message in (
        ("preprocessing.crop_pct=0", "preprocessing.crop_pct must be a number from 0.1 to 1, not 0"),
        ("preprocessing.interpolation=best", "preprocessing.interpolation must be one of nearest"),
        ("preprocessing.std=[0, 1, 1]", "preprocessing.std must be from"),
    ):
        recipe = load_recipe("cifar10_small", [change])
        with pytest.raises(ConfigError, match=message):
            open_images("vit_tiny_patch16_224", recipe, str(folder))
    for split in ("train", "val"):
        (folder / split / "a").rename(folder / split / "caf\udce9")
    with pytest.raises(DataError, match=r"The class 'caf\\udce9' has a name that is not UTF-8: rename it"):
        open_images("vit_tiny_patch16_224", load_recipe("cifar10_small"), str(folder))


def test_one_training_may_augment_otherwise(digits: ImageSets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["quantized.augmentation={hflip: 0.5, scale: [0.9, 1.0]}"])
    seen: list[Mapping[str, Any] | None] = []

    def note(*args: Any, **kwargs: Any) -> Batches:
        seen.append(args[4])
        raise InterruptedError

    monkeypatch.setattr(methods, "training_batches", note)
    spec = describe("vit_tiny_patch16_224", recipe.model_args, digits.classes, recipe.preprocessing)
    for hyperparameters in (recipe.hyperparameters("full_precision"), recipe.hyperparameters("quantized")):
        with pytest.raises(InterruptedError):
            methods._fit(None, None, digits, hyperparameters, recipe, spec, Options(tmp_path), Console())  # type: ignore[arg-type]
    assert seen == [recipe.augmentation, {**recipe.augmentation, "hflip": 0.5, "scale": [0.9, 1.0]}]
