"""COCO files: run lengths as pycocotools reads them, and damaged ones refused before it could crash."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from rollsight.inspect.coco import decode_counts, encode, read_coco, write_coco
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import open_labels

PIT, SCRATCH = {"id": 3, "name": "pit"}, {"id": 7, "name": "scratch"}


def annotation(segmentation, category=3, **further):
    return {"id": 1, "image_id": 1, "category_id": category, "segmentation": segmentation, **further}


@pytest.fixture
def write(tmp_path):
    """Writes one image of 8 x 6 px and its COCO file; the file's path."""

    def write(annotations, file="instances_val2017.json", categories=(SCRATCH, PIT), **image):
        Image.new("L", (8, 6), 100).save(tmp_path / "a.png")
        entry = {"id": 1, "file_name": "a.png", "width": 8, "height": 6, **image}
        content = {"images": [entry], "annotations": annotations, "categories": list(categories)}
        (tmp_path / file).write_text(json.dumps(content))
        return tmp_path / file

    return write


def read_one(path, **options):
    [image] = read_coco(path, **options).images
    if isinstance(image, UserError):
        assert "\n" not in str(image)
        raise image
    return image


binary = npst.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@given(binary)
@settings(max_examples=60, deadline=None)
def test_run_lengths_are_those_of_pycocotools(mask):
    theirs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = decode_counts(theirs["counts"].decode())
    ours = encode(mask, 0, 0, mask.shape)

    assert np.array_equal(np.repeat(np.arange(len(counts)) % 2, counts).reshape(mask.T.shape).T, mask)
    assert ours["counts"] == theirs["counts"].decode()


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_text_is_counts_or_refused(text):
    try:
        counts = decode_counts(text)
    except UserError:
        return
    assert counts.dtype == np.int64


def test_pycocotools_opens_what_is_written(labelled_folder, tmp_path, capsys):
    data = open_labels(labelled_folder)
    write_coco(data, tmp_path / "out")
    theirs = COCO(tmp_path / "out" / "val.json")
    [sample] = data.of_split("val").samples

    [image] = theirs.loadImgs(theirs.getImgIds())
    [entry] = theirs.loadAnns(theirs.getAnnIds())
    mask = theirs.annToMask(entry)

    assert (tmp_path / "out" / image["file_name"]).is_file()
    assert np.array_equal(mask * entry["category_id"], sample.read()[1])
    assert entry["area"] == mask.sum()
    assert theirs.loadCats([1, 2]) == [{"id": 1, "name": "pit"}, {"id": 2, "name": "scratch"}]


def test_a_polygon_has_the_pixels_whose_centre_it_holds(write):
    mask = read_one(write([annotation([[1, 1, 5, 1, 5, 4, 1, 4]])])).mask

    expected = np.zeros((6, 8), np.uint8)
    expected[1:4, 1:5] = 1
    assert np.array_equal(mask, expected)


def test_a_polygon_too_thin_to_hold_a_centre_keeps_its_outline(write):
    mask = read_one(write([annotation([[1.1, 2.1, 6.2, 2.1, 6.2, 2.2]])])).mask

    assert mask[2, 1:7].all()
    assert mask.sum() == 6


def test_the_later_of_two_annotations_wins_and_crowds_are_drawn_like_any(write):
    whole = annotation({"size": [6, 8], "counts": [0, 48]})
    later = annotation([[1, 1, 3, 1, 3, 3, 1, 3]], category=7, iscrowd=1)

    mask = read_one(write([whole, later])).mask

    assert mask[1, 1] == 2
    assert (mask == 1).sum() == 44


def test_classes_are_the_categories_by_id_or_as_given(write):
    path = write([annotation([[1, 1, 3, 1, 3, 3, 1, 3]])])

    assert read_coco(path).classes == ("pit", "scratch")
    assert read_one(path, classes=["scratch", "pit"]).mask.max() == 2
    with pytest.raises(UserError, match=r"annotation 1: label 'pit' is none of .*scratch"):
        read_one(path, classes=["scratch"])


def test_background_and_ignore_are_categories_but_no_classes(write):
    special = ({"id": 1, "name": "__ignore__"}, {"id": 2, "name": "_background_"}, PIT)
    whole = {"size": [6, 8], "counts": [0, 48]}
    erased = annotation([[1, 1, 3, 1, 3, 3, 1, 3]], category=2)
    path = write([annotation(whole, category=1), erased], categories=special)

    assert read_coco(path).classes == ("pit",)
    assert np.unique(read_one(path).mask).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("file", "field", "split"),
    [
        ("instances_val2017.json", "", "val"),
        ("valid/_annotations.coco.json", "", "val"),
        ("instances_val2017.json", "test", "test"),
    ],
)
def test_the_split_is_said_by_the_image_or_by_the_names_of_the_files(tmp_path, write, file, field, split):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    write([], file=file, split=field)
    Image.new("L", (8, 6)).save((tmp_path / file).parent / "a.png")

    assert read_one(tmp_path).split == split


def test_an_image_is_looked_for_beside_the_file_in_images_and_where_one_says(tmp_path, write):
    path = write([])
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "images" / "a.png")
    assert read_one(path).name.name == "a.png"

    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert read_one(path, images=tmp_path / "elsewhere").name.name == "a.png"
    with pytest.raises(UserError, match=r"image 1: .*a.png: no such image: .*--images"):
        read_one(path)


def test_an_image_of_another_size_is_refused_with_both_sizes(write):
    with pytest.raises(UserError, match="8 x 6 px, but its labels are for 9 x 6 px"):
        read_one(write([], width=9))


@pytest.mark.parametrize(
    ("segmentation", "match"),
    [
        ([], "no segmentation: a box is no mask"),
        ([[1, 1, 5, 1]], "polygon of 4 numbers"),
        ([[1, 1, 5, 1, 5]], "polygon of 5 numbers"),
        ([[1, 1, 5, 1, 5, 2e8]], "far out of the image"),
        ([[i // 2 % 2 * 8e3 for i in range(400)]], "outline is .* px long"),
        ([[20, 20, 25, 20, 25, 25]], "covers no pixel"),
        ({"size": [8, 6], "counts": [48]}, r"for \(8, 6\), the image is \(6, 8\)"),
        ({"size": [6, 8], "counts": [40]}, "do not add up"),
        ({"size": [6, 8], "counts": [0, 49]}, "do not add up"),
        ({"size": [6, 8], "counts": [-1, 49]}, "do not add up"),
        ({"size": [6, 8], "counts": [10**30]}, "do not add up"),
        ({"size": [6, 8], "counts": []}, "do not add up"),
        ({"size": [6, 8], "counts": "1"}, "do not add up"),
        ({"size": [6, 8], "counts": ""}, "damaged"),
        ({"size": [6, 8], "counts": "o"}, "damaged"),  # says that more follows: pycocotools reads on
        ({"size": [6, 8], "counts": "é"}, "damaged"),
        ({"size": [6, 8], "counts": "oooooooo0"}, "over 35 bits"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_segmentation_is_refused_in_one_line(write, segmentation, match):
    with pytest.raises(UserError, match=f"image 1: annotation 1: .*{match}"):
        read_one(write([annotation(segmentation)]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_id": 9}, "of image 9, which is not listed"),
        ({"category_id": 9}, "of category 9, which is not listed"),
        ({"segmentation": [[1, "x"]]}, "not a COCO file: annotations.0.segmentation"),
        ({"segmentation": [[float("nan")] * 6]}, "not a COCO file: annotations.0.segmentation"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(write, change, match):
    path = write([annotation([[1, 1, 3, 1, 3, 3]]) | change])

    with pytest.raises(UserError, match=f"instances_val2017.json: .*{match}"):
        read_coco(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000, '{"images": 3}', "\xff"])
def test_what_is_no_coco_file_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")

    with pytest.raises(UserError, match=r"a.json: not a COCO file"):
        read_coco(tmp_path)


def test_a_folder_without_files_and_a_file_that_is_not_there_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "a.json"):
        with pytest.raises(UserError, match=r"no COCO file|no such file"):
            read_coco(path)


def test_two_images_of_one_id_are_refused(write):
    path = write([])
    content = json.loads(path.read_text())
    content["images"] *= 2
    path.write_text(json.dumps(content))

    with pytest.raises(UserError, match="one image id"):
        read_coco(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(write, data):
    path = write([annotation([[1, 1, 5, 1, 5, 4]]), annotation({"size": [6, 8], "counts": "<4"})])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(32, 126))
    path.write_bytes(content)

    try:
        for image in read_coco(path).images:
            assert isinstance(image, UserError) or image.mask.shape == (6, 8)
    except UserError as error:
        assert "\n" not in str(error)
