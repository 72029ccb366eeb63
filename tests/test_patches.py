"""Scenes and patches: only training data, at native resolution, around the defect."""

import numpy as np
import pytest
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import open_labels
from rollsight.synth.patches import (
    Scene,
    class_value,
    clean_places,
    held_groups,
    patch_around,
    read_scenes,
    refuse_held,
)


def test_scenes_come_from_the_train_split_only(labelled_folder):
    data = open_labels(labelled_folder)

    scenes = read_scenes(data.of_split("train"))

    assert [scene.group for scene in scenes] == ["piece-0", "piece-1", "piece-2", "piece-3"]
    assert held_groups(data) == ["piece-4", "piece-5"]
    with pytest.raises(
        UserError, match=r"group 'piece-4' is of split val: synthetic data is made of"
    ) as found:
        read_scenes(data)
    assert found.value.exit_code == USAGE


def test_a_background_of_a_held_back_group_is_refused(labelled_folder):
    held = held_groups(open_labels(labelled_folder))

    refuse_held(["piece-1", "roll-7"], held, "backgrounds")
    with pytest.raises(UserError, match=r"backgrounds: group 'piece-5' is in val or test"):
        refuse_held(["piece-1", "piece-5"], held, "backgrounds")


def test_an_unknown_class_is_one_clear_line():
    assert class_value(["pit", "scratch"], "scratch", "here") == 2
    with pytest.raises(UserError, match="class 'dent' is not known: here labels pit, scratch"):
        class_value(["pit", "scratch"], "dent", "here")


def test_a_patch_is_a_part_of_its_scene_with_the_defect_near_its_middle():
    rng = np.random.default_rng(0)
    image = rng.random((90, 120)).astype(np.float32)
    mask = np.zeros((90, 120), dtype=np.uint8)
    mask[60, 70] = 2
    scene = Scene(image, mask, "a.png", "a")

    for _ in range(20):
        patch, labels = patch_around(scene, np.argwhere(mask == 2), 32, rng)
        [(y, x)] = np.argwhere(labels == 2)
        np.testing.assert_array_equal(patch, image[60 - y : 92 - y, 70 - x : 102 - x])
        assert 8 <= y <= 24 and 8 <= x <= 24


def test_clean_places_hold_no_defect_and_nothing_unknown():
    mask = np.zeros((70, 70), dtype=np.uint8)
    mask[:, 33], mask[:20] = 1, 255
    scene = Scene(np.zeros(mask.shape, np.float32), mask, "a.png", "a")

    [place] = clean_places([scene, Scene(mask[:8] * np.float32(0), mask[:8], "b", "b")], 32)

    for y, x in place.origins:
        assert not mask[y : y + 32, x : x + 32].any()
    # 19 rows of origins below line 20, 2 columns left of the defect and 5 right of it
    assert len(place.origins) == 19 * (2 + 5)
