"""The rule of `moce init`: what follows from the number and size of the images, and from the hardware."""

from typing import Any

import pytest

from moce_ds.cli.workflow.recipe import Hardware, Images, Recipe

CPUS, BOX = Hardware(1, 0, 2), Hardware(1, 8, 96)


def values(count: int, side: int, hardware: Hardware, **given: Any) -> dict[str, Any]:
    """The chosen values by the last parts of their keys."""
    recipe = Recipe(Images(count, side, 110e3), hardware, **given)
    return {chosen.key.removeprefix("settings."): chosen.value for chosen in recipe.choices()}


def test_a_million_images_on_eight_gpus_give_the_public_recipe_and_the_paper_s_experts() -> None:
    found = values(1_000_000, 375, BOX)
    mae = ("model.vit", "data.image_size", "optim.epochs", "optim.batch_size", "optim.base_lr", "optim.warmup_epochs")
    assert [found[f"mae.{key}"] for key in mae] == ["vit_base_patch16_224", 224, 800, 4096, 1.5e-4, 40]
    moce = ("experts.num", "experts.ep_size", "optim.epochs", "optim.base_lr", "optim.warmup_epochs")
    assert [found[f"moce.{key}"] for key in moce] == [8, 8, 200, 1.5e-5, 10]
    assert found["clusters.num_clusters"] == 256
    assert not {"mae.model.decoder_width", "mae.engine.precision", "mae.data.order"} & set(found)


def test_three_thousand_photographs_on_two_cores_are_a_short_run_of_a_small_model() -> None:
    found = values(3_000, 375, CPUS)
    assert (found["mae.model.vit"], found["mae.data.image_size"]) == ("vit_tiny_patch16_224", 128)
    assert found["mae.engine.precision"] == "fp32" and found["moce.experts.ep_size"] == 2
    seen = 3_000 * (found["mae.optim.epochs"] + 2 * found["moce.optim.epochs"])
    assert seen <= 120_000, "half an hour on two slow cores, at 70 images a second"
    assert found["mae.optim.base_lr"] > 1e-3 > found["mae.run.checkpoint_every"] / 1e6
    assert found["clusters.num_clusters"] == 10


@pytest.mark.parametrize(
    ("side", "hardware", "size", "patch"),
    [
        (375, BOX, 224, 16),
        (200, BOX, 192, 16),
        (100, BOX, 96, 8),
        (32, BOX, 32, 4),
        (10, BOX, 16, 2),
        (90, CPUS, 88, 8),
    ],
)
def test_the_input_has_the_images_own_size_in_whole_patches(
    side: int, hardware: Hardware, size: int, patch: int
) -> None:
    found = values(50_000, side, hardware)
    assert (found["mae.data.image_size"], found.get("mae.model.patch_size", 16)) == (size, patch)
    assert (found.get("mae.data.center_crop") == 1.0) == (size > 0.875 * side), "no crop that is enlarged"


@pytest.mark.parametrize("count", [100, 2_000, 30_000, 1_000_000, 20_000_000])
@pytest.mark.parametrize("hardware", [CPUS, Hardware(1, 0, 7), Hardware(1, 1, 8), Hardware(2, 6, 8), Hardware(8, 8, 8)])
def test_the_processes_can_share_the_work(count: int, hardware: Hardware) -> None:
    found = values(count, 256, hardware)
    assert found["mae.optim.batch_size"] % hardware.world_size == 0
    assert found["moce.experts.num"] % found["moce.experts.ep_size"] == 0
    assert hardware.processes % found["moce.experts.ep_size"] == 0
    assert found["clusters.num_clusters"] >= 2 * found["moce.experts.num"]
    assert found["mae.optim.epochs"] * count >= 200 and found["moce.optim.epochs"] > 0


def test_a_larger_set_takes_a_larger_model_unless_one_is_given() -> None:
    sizes = [values(count, 256, Hardware(4, 8, 8))["mae.model.vit"] for count in (5_000, 50_000, 500_000, 14_000_000)]
    assert [size.split("_")[1] for size in sizes] == ["tiny", "small", "base", "large"]
    assert values(5_000, 256, BOX, size="vit_large")["mae.model.vit"] == "vit_large_patch16_224"
    assert values(14_000_000, 256, Hardware(4, 8, 8))["mae.data.order"] == "blocks"


def test_few_images_are_called_few() -> None:
    warning = Recipe(Images(800, 256, 1e5), CPUS).warning
    assert warning and warning.startswith("800 images are few: about 100 for each of 8 clusters")
    assert Recipe(Images(2_400, 256, 1e5), CPUS).warning is None
