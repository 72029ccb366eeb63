"""Labelme files: every kind of shape is drawn as Labelme draws it, and a broken file is named in one line."""

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.labelme import read_labelme, write_labelme
from rollsight.inspect.labels import open_labels


def b64(pixels, kind="PNG"):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return base64.b64encode(content.getvalue()).decode()


def shape(kind, points, label="pit", **further):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, **further}


@pytest.fixture
def write(tmp_path):
    """Writes one image of 12 x 10 px and its Labelme file; the file's path."""

    def write(*shapes, name="a", **further):
        Image.new("L", (12, 10), 100).save(tmp_path / f"{name}.png")
        content = {
            **{"version": "5.5.0", "flags": {}, "shapes": list(shapes), "imagePath": f"{name}.png"},
            **{"imageData": None, "imageHeight": 10, "imageWidth": 12, **further},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path / f"{name}.json"

    return write


def read_one(path, **options):
    [image] = read_labelme(path, **options).images
    if isinstance(image, UserError):
        assert "\n" not in str(image)
        raise image
    return image


def filled(ys, xs, value=1):
    mask = np.zeros((10, 12), np.uint8)
    mask[ys, xs] = value
    return mask


@pytest.mark.parametrize(
    ("kind", "points", "expected"),
    [
        ("polygon", [[2, 1], [6, 1], [6, 4], [2, 4]], filled(slice(1, 5), slice(2, 7))),
        (None, [[2, 1], [6, 1], [6, 4], [2, 4]], filled(slice(1, 5), slice(2, 7))),
        ("rectangle", [[6, 4], [2, 1]], filled(slice(1, 5), slice(2, 7))),
        ("oriented_rectangle", [[2, 1], [6, 1], [6, 4], [2, 4]], filled(slice(1, 5), slice(2, 7))),
        ("line", [[2, 5], [8, 5]], filled(5, slice(2, 9))),
        ("linestrip", [[2, 5], [8, 5], [8, 8]], filled(5, slice(2, 9)) | filled(slice(5, 9), 8)),
        ("point", [[4, 4]], filled(4, 4)),
        ("circle", [[5, 5], [5, 5]], filled(5, 5)),
        ("rectangle", [[-5, -5], [30, 2]], filled(slice(0, 3), slice(None))),
    ],
)
def test_a_shape_has_the_pixels_that_labelme_gives_it(write, kind, points, expected):
    assert np.array_equal(read_one(write(shape(kind, points)), line_px=1).mask, expected)


def test_a_circle_goes_through_its_second_point(write):
    mask = read_one(write(shape("circle", [[5, 5], [5, 8]]))).mask

    assert mask[5, 2] and mask[5, 8] and mask[2, 5] and mask[8, 5]
    assert not mask[2, 2]
    assert np.array_equal(mask[1:10, 1:10], mask[1:10, 1:10].T)


def test_a_line_is_as_wide_as_one_says(write):
    path = write(shape("line", [[0, 5], [11, 5]]))

    assert read_one(path, line_px=3).mask[:, 6].sum() == 3


def test_a_mask_shape_keeps_its_hole(write):
    pixels = np.ones((4, 5), bool)
    pixels[1:3, 1:3] = False

    mask = read_one(write(shape("mask", [[3, 2], [7, 5]], mask=b64(pixels)))).mask

    assert np.array_equal(mask[2:6, 3:8], pixels)
    assert mask.sum() == pixels.sum()


def test_a_mask_shape_that_was_moved_over_the_border_is_cut(write):
    mask = read_one(write(shape("mask", [[-1.5, 8.4], [2.5, 11.4]], mask=b64(np.ones((4, 5), bool))))).mask

    assert np.array_equal(mask, filled(slice(8, 10), slice(0, 3)))


def test_a_later_background_shape_cuts_a_hole_and_later_shapes_win(write):
    outer = shape("rectangle", [[1, 1], [9, 8]])
    hole = shape("rectangle", [[3, 3], [6, 6]], label="_background_")
    pit = shape("point", [[4, 4]], label="scratch", group_id=3)
    hidden = shape("rectangle", [[11, 0], [11, 9]], label="__ignore__")

    mask = read_one(write(outer, hole, pit, hidden), line_px=1).mask

    assert (mask[1, 1], mask[3, 3], mask[4, 4], mask[0, 11]) == (1, 0, 2, 255)


def test_classes_are_those_given_else_of_labels_txt_else_all_labels(tmp_path, write):
    path = write(shape("point", [[4, 4]], label="scratch"), shape("point", [[8, 8]]))
    assert read_labelme(path).classes == ("pit", "scratch")

    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\nscratch\npit\n\n")
    assert read_labelme(path).classes == ("scratch", "pit")
    with pytest.raises(UserError, match=r"a.json: shape 1: label 'scratch' is none of .*pit"):
        read_one(path, classes=["pit"])


def test_the_image_inside_a_file_is_taken(tmp_path, write):
    inside = np.arange(120, dtype=np.uint8).reshape(10, 12)
    path = write(imageData=b64(inside), imagePath="gone.jpg", shapes=[])
    (tmp_path / "a.png").unlink()

    image = read_one(path, classes=["pit"])

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.content))), inside)
    assert image.name.name == "a.png"


def test_the_first_picture_of_a_multi_picture_jpeg_inside_a_file_is_taken(write):
    content = io.BytesIO()
    first, second = (Image.new("L", (12, 10), gray) for gray in (40, 200))
    first.save(content, "MPO", save_all=True, append_images=[second])

    image = read_one(write(imageData=base64.b64encode(content.getvalue()).decode()), classes=["pit"])

    assert image.name.name == "a.jpg"
    assert np.asarray(Image.open(io.BytesIO(image.content))).max() < 100


def test_an_image_in_another_folder_is_found_by_its_windows_path_or_by_where_one_says(tmp_path, write):
    path = write(imagePath="..\\pictures\\a.png")
    for folder in ("pictures", "json", "elsewhere"):
        (tmp_path / folder).mkdir()
    path.rename(tmp_path / "json" / "a.json")
    (tmp_path / "a.png").rename(tmp_path / "pictures" / "a.png")
    assert read_one(tmp_path, classes=["pit"]).name.as_posix() == "pictures/a.png"

    (tmp_path / "pictures" / "a.png").rename(tmp_path / "elsewhere" / "a.png")
    found = read_one(tmp_path / "json", images=tmp_path / "elsewhere", classes=["pit"])
    assert found.name.as_posix() == "a.png"


def test_split_and_group_come_from_the_file_or_its_folders(tmp_path, write):
    path = write(shape("point", [[4, 4]]), group="coil-7", split="test")
    assert (read_one(path).split, read_one(path).group) == ("test", "coil-7")

    path = write(shape("point", [[4, 4]]))
    (tmp_path / "val" / "coil-3").mkdir(parents=True)
    for file in (path, path.with_suffix(".png")):
        file.rename(tmp_path / "val" / "coil-3" / file.name)
    image = read_one(tmp_path)
    assert (image.split, image.group, image.name.as_posix()) == ("val", "coil-3", "coil-3/a.png")


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (shape("polygon", [[1, 1], [2, 2]]), "polygon has 2 points: needed 3 to"),
        (shape("rectangle", [[1, 1]]), "rectangle has 1 points: needed 2 to 2"),
        (shape("blob", [[1, 1]]), "shape_type 'blob' is none of polygon"),
        (shape("circle", [[1, 1], [1, 1e9]]), "far out of the image"),
        (shape("linestrip", [[0, 0], [9e3, 0]] * 80), "outline is .* px long"),
        (shape("mask", [[1, 1], [3, 3]]), "not a readable image"),
        (shape("mask", [[1, 1], [3, 3]], mask="&&"), "no base64"),
        (shape("mask", [[1, 1], [3, 3]], mask=b64(np.ones((4, 3), bool))), "3 x 4 px, its box 3 x 3 px"),
        (shape("mask", [[1, 1], [3, 3]], mask=b64(np.ones((3, 3, 3), np.uint8))), "must be equal"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_broken_shape_is_refused_in_one_line(write, broken, match):
    with pytest.raises(UserError, match=f"a.json: shape 1: .*{match}"):
        read_one(write(broken))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"imageWidth": 13}, "12 x 10 px, but its labels are for 13 x 10 px"),
        ({"imagePath": "b.png"}, "b.png: no such image"),
        ({"imagePath": "../../b.png"}, "inside the folder"),
        ({"imageData": "&&"}, "imageData is no base64"),
        ({"imageData": "aGVsbG8="}, "not a readable image"),
        ({"imageData": b64(np.zeros((10, 12), np.uint8), "GIF")}, "not a readable image"),
        ({"shapes": 3}, "not a Labelme file: shapes"),
        ({"shapes": [shape("point", [[1]])]}, "not a Labelme file: shapes.0.points"),
        ({"shapes": [shape("point", [[1, 2]], group_id="x")]}, "not a Labelme file: shapes.0.group_id"),
        ({"flags": {"reviewed": "perhaps"}}, "not a Labelme file: flags.reviewed"),
        ({"split": "later"}, "not a Labelme file: split"),
        ({"proposal": {}}, "not a Labelme file: proposal.model"),
    ],
    ids=str,
)
def test_a_broken_file_is_refused_in_one_line(write, change, match):
    path = write(**change)

    with pytest.raises(UserError, match=f"a.json.*{match}"):
        read_one(path, classes=["pit"])


def test_a_folder_without_files_or_labels_is_refused(tmp_path, write):
    with pytest.raises(UserError, match="no Labelme file there"):
        read_labelme(tmp_path)
    with pytest.raises(UserError, match="expected a list of 1 to 254"):
        read_labelme(write())


def test_what_is_written_is_what_labelme_writes(labelled_folder, tmp_path):
    write_labelme(open_labels(labelled_folder), tmp_path / "out")

    file = json.loads((tmp_path / "out" / "val" / "4.json").read_text())
    [only] = file["shapes"]
    (x0, y0), (x1, y1) = only["points"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(only["mask"]))))

    assert (file["imagePath"], file["imageHeight"], file["imageWidth"]) == ("4.png", 72, 80)
    assert (tmp_path / "out" / "val" / "4.png").is_file()
    assert only["shape_type"] == "mask"
    assert pixels.shape == (y1 - y0 + 1, x1 - x0 + 1)
    assert (tmp_path / "out" / "labels.txt").read_text().split()[2:] == ["pit", "scratch"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(write, data):
    path = write(
        shape("polygon", [[2, 1], [6, 1], [6, 4]]),
        shape("mask", [[3, 2], [7, 5]], mask=b64(np.ones((4, 5), bool))),
        imageData=b64(np.zeros((10, 12), np.uint8)),
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(32, 126))
    path.write_bytes(content)

    for image in read_labelme(path, classes=["pit"]).images:
        assert isinstance(image, UserError) or image.mask.ndim == 2
        assert not isinstance(image, UserError) or "\n" not in str(image)
