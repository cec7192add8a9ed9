from __future__ import annotations

import math

import pytest
import torch
from timm.models.swin_transformer import window_partition

from conftest import make_vit
from members import family_member, student_of
from qvit import QuantConfig
from qvit.analysis.attention_range import AttentionRange, attention_grids
from qvit.models.families import image_size_of
from qvit.models.queries import run_with_maps

VIT = {
    "deit": {"name": "deit_tiny_patch16_224"},
    "registers": {"reg_tokens": 4},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "not_square": {"img_size": (16, 24), "patch_size": (4, 8)},
    "partial_patches": {"img_size": (18, 19)},
}
FAMILIES = ["swin_not_square", "swinv2", "swinv2_cr_stage_norms", "beit", "relpos_class_token", "eva02", "mixed_rotary"]
FAMILIES += ["siglip_classifier"]
PREFIX = {**dict.fromkeys([*VIT, *FAMILIES], 0), "registers": 5, "distilled": 2}
PREFIX |= dict.fromkeys(
    ["deit", "not_square", "partial_patches", "beit", "relpos_class_token", "eva02", "mixed_rotary"], 1
)


def member_of(member):
    if member not in VIT:
        return family_member(member)
    model = make_vit(**VIT[member])
    return model, torch.randn(4, 3, *image_size_of(model))


@pytest.mark.parametrize("member", [*VIT, *FAMILIES])
def test_every_family_against_loops_over_pairs_of_patches(member):
    model, images = member_of(member)
    size = tuple(images.shape[2:])
    grids = attention_grids(model, size)
    assert attention_grids(student_of(model, images, QuantConfig(4)), size) == grids
    with torch.no_grad():
        maps = run_with_maps(model, images)[1]
    measured = AttentionRange(grids)
    for part in (slice(0, 1), slice(1, None)):  # each image has as many windows
        measured.add([layer.unflatten(0, (len(images), -1))[part].flatten(0, 1) for layer in maps])
    for layer, (grid, found) in enumerate(zip(grids, measured.result(), strict=True)):
        assert grid.prefix == PREFIX[member]
        assert maps[layer].shape[-1] == grid.prefix + math.prod(grid.window)
        total = [0.0] * maps[layer].shape[1]
        count = 0
        for window in maps[layer].double():
            for i in range(math.prod(grid.window)):
                count += 1
                for head, rows in enumerate(window):
                    row = rows[grid.prefix + i, grid.prefix :]
                    reached = 0.0
                    for j, weight in enumerate(row.tolist()):
                        (a, b), (c, d) = (divmod(k, grid.window[1]) for k in (i, j))
                        reached += weight * math.hypot((a - c) * grid.pitch[0], (b - d) * grid.pitch[1])
                    total[head] += reached / float(row.sum())
            if count >= 48:
                break
        if count == maps[layer].shape[0] * math.prod(grid.window):
            assert found == pytest.approx([value / count for value in total], rel=1e-4)
        assert all(0 < value < math.hypot(*size) for value in found)


def test_pixels_grow_where_patches_are_merged():
    model, _ = family_member("swin")
    grids = attention_grids(model, (32, 32))
    assert [(grid.grid, grid.window, grid.shift, grid.pitch) for grid in grids] == [
        ((8, 8), (4, 4), (0, 0), (4, 4)),
        ((8, 8), (4, 4), (2, 2), (4, 4)),
        ((4, 4), (4, 4), (0, 0), (8, 8)),
        ((4, 4), (4, 4), (0, 0), (8, 8)),
    ]


def test_a_token_alone_attends_over_no_distance_and_one_in_the_far_corner_over_the_diagonal():
    model = make_vit(class_token=False, global_pool="avg", depth=1)
    (grid,) = attention_grids(model, (16, 16))
    for maps, expected in ((torch.eye(16), 0.0), (torch.eye(16).flip(1), None)):
        measured = AttentionRange([grid])
        measured.add([maps.expand(2, 1, 16, 16)])
        (found,) = measured.result()
        if expected is None:
            expected = sum(math.hypot(3 - 2 * (i // 4), 3 - 2 * (i % 4)) * 4 for i in range(16)) / 16
        assert found == pytest.approx([expected], abs=1e-3)


def test_what_is_attended_to_in_shifted_windows_is_shown_where_it_is_in_the_image():
    model, _ = family_member("swin_not_square")
    for grid in attention_grids(model, (32, 64)):
        rows, columns = grid.grid
        places = torch.arange(rows * columns).view(1, rows, columns, 1)
        shifted = places.roll((-grid.shift[0], -grid.shift[1]), dims=(1, 2))
        tokens = window_partition(shifted, grid.window).flatten(1).float() + 1  # the place, at each token of a window
        n = tokens.shape[1]
        received = grid.received(tokens[:, None, None, :].expand(-1, 2, n, n))
        expected = (places.float() + 1)[..., 0]
        torch.testing.assert_close(received, expected / expected.sum())


def test_the_class_token_says_what_is_attended_to():
    model = make_vit(reg_tokens=2)
    grid = attention_grids(model, (16, 16))[0]
    maps = torch.full((1, 2, 19, 19), 0.5)
    maps[:, :, 0] = 0
    maps[:, :, 0, 3 + 6] = 1.0
    assert grid.received(maps)[0].nonzero().tolist() == [[1, 2]]
