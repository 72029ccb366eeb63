"""The patches of an inspection system in; out come a roll with all else not inspected, and its events."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rollsight.inspect.defects import SCHEMA
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.ingest import ingest
from rollsight.inspect.linescan import read_row
from rollsight.inspect.patch_export import ingest_patches
from rollsight.inspect.strips import Strip
from rollsight.inspect.tiles import CELL
from rollsight.jobs.summary import COVERAGE_NEEDED, inspected, strip_edges

UNSAID = Strip("coil-1", None, (), None, None)
FIELDS = {"side": "top", "mm_per_px_x": 0.5, "mm_per_line": 2.0, "width_mm": 256, "length_m": 20}
WIDTH, LINES = 512, 10_000  # px
HEAD = "id,class,x,y,width,length,image\n"


def noise(lines: int, width: int, seed: int = 0, low: int = 60, high: int = 190):
    return np.random.default_rng(seed).integers(low, high, (lines, width), np.uint8)


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "strip.json").write_text(json.dumps(FIELDS))
    return folder


@pytest.fixture
def destination(tmp_path):
    (tmp_path / "rolls").mkdir()
    return tmp_path / "rolls/coil-1.zarr"


def write(folder: Path, rows: str, head: str = HEAD, images=("a.png",), lines=128, width=128) -> Path:
    for i, name in enumerate(images):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(noise(lines, width, i)).save(folder / name)
    (folder / "events.csv").write_text(head + rows)
    return folder


def refusal(export: Path, destination: Path, strip: Strip = UNSAID, **options) -> str:
    with pytest.raises(UserError) as error:
        ingest_patches(export, destination, strip, **options)
    assert str(error.value).isprintable()
    assert list(destination.parent.iterdir()) == []
    return str(error.value)


def cell_rows(roll):
    """What a scan makes of the roll, row of cells by row of cells."""
    gray, valid = roll.read_unit(0, roll.lines), roll.read_lines(0, roll.lines).valid
    for y in range(0, roll.lines, CELL):
        above = gray[:, y - 1] if y else None
        yield read_row(gray[:, y : y + CELL], valid[y : y + CELL], y, above)


def test_a_patch_lies_where_its_event_says(export, destination):
    """The middle at x 100 mm and y 4 m is px 200 and line 2000; the canvas has the strip's size."""
    roll = ingest_patches(write(export, "7,pit,100,4000,10,20,a.png\n"), destination, UNSAID).roll
    assert (roll.width, roll.lines) == (WIDTH, LINES)
    assert np.array_equal(roll.read(1936, 2064)[0, :, 136:264], noise(128, 128))
    assert (roll.read(0, 1900) == 255).all() and (roll.read(2120, LINES) == 255).all()
    assert not roll.read_lines(0, 1900).valid.any() and not roll.read_lines(2120, LINES).valid.any()


def test_all_but_the_patch_is_not_inspected(export, destination):
    """A patch on whole cells: of each row of cells exactly those are inspected."""
    roll = ingest_patches(write(export, "1,pit,96,3968,10,20,a.png\n"), destination, UNSAID).roll
    found = {}
    for row in cell_rows(roll):
        found[row.y0] = (row.y1 - row.y0) * WIDTH - row.not_inspected_px
        if row.left is not None:
            assert (row.left, row.right) == (0, WIDTH)  # x is from the strip's edge, not from the patch's
            beside = {(part.x0, part.x1) for part in row.not_inspected if part.reason == "saturated"}
            assert beside == {(0, 128), (256, 512)}
    # The patch's first line repeats the border above it, as a line that the camera dropped would.
    assert {y: px for y, px in found.items() if px} == {1920: 63 * 128, 1984: 64 * 128}


@pytest.mark.parametrize("seed", range(3))
def test_the_inspected_area_is_about_that_of_the_patches(export, destination, seed):
    """Cells count whole from half on, so a row may count twice its patches' px, and the roll as many."""
    rng = np.random.default_rng(seed)
    names = [f"{i}.png" for i in range(30)]
    places = [(rng.uniform(0, 256), rng.uniform(0, 20_000)) for _ in names]
    rows = "".join(f"1,pit,{x:.3f},{y:.3f},,,{name}\n" for (x, y), name in zip(places, names, strict=True))
    roll = ingest_patches(write(export, rows, images=names), destination, UNSAID).roll
    seen = np.zeros((LINES, WIDTH), bool)
    for x, y in places:
        left, top = round(x / 0.5 - 64), round(y / 2 - 64)
        seen[max(0, top) : max(0, top + 128), max(0, left) : max(0, left + 128)] = True
    rows_of_cells = list(cell_rows(roll))
    for row in rows_of_cells:
        found = (row.y1 - row.y0) * WIDTH - row.not_inspected_px
        assert found <= 2 * seen[row.y0 : row.y1].sum()
    coverage, _ = inspected(rows_of_cells, *strip_edges(rows_of_cells, WIDTH))
    assert 0.75 * seen.mean() < coverage < 1.05 * seen.mean()
    assert coverage < COVERAGE_NEEDED  # so the verdict is HOLD


def test_the_events_are_a_defect_table(export, destination):
    rows = "7,pit,100,4000,10,20,a.png\nE-8,scratch,20.5,9000,,,none.png\n,,30,9000,1,2,\n"
    result = ingest_patches(write(export, rows), destination, UNSAID)
    table = pq.read_table(result.events)
    assert result.events == str(destination.with_name("coil-1.events.parquet"))
    assert [(field.name, field.type) for field in SCHEMA] == [
        (field.name, field.type) for field in table.schema if field.name in SCHEMA.names
    ]
    assert table.schema.metadata[b"rollsight_defects"] == SCHEMA.metadata[b"rollsight_defects"]
    first, second, third = table.to_pylist()
    assert (first["defect_id"], first["event"], first["class"]) == (1, "7", "pit")
    assert (first["x_mm"], first["y_m"], first["width_mm"], first["length_mm"]) == (95, 3.99, 10, 20)
    assert [first[name] for name in ("x0", "y0", "x1", "y1")] == [190, 1995, 210, 2005]
    assert (second["x_mm"], second["width_mm"], second["x0"], second["image"]) == (20.5, None, None, None)
    assert (third["class"], third["event"]) == ("unclassified", None)
    assert "2 events have no image in the folder and so no patch: rows 3, 4" in result.notes[2]


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("Defect ID;Defect Class;Pos X [mm];Pos Y [m];Image File\n", "1;pit;100,0;4,0;a.png\n"),
        ("Nr\tKlasse\tX_mm\tY_m\tBild\n", "1\tpit\t100\t4.0\ta.png\n"),
        ("event_id,class name,Distance DS (cm),Distance from head (M),file name\n", "1,pit,10,4,a.png\n"),
        ("code,CD/mm,MD/mm,image_path,resolution\n", 'pit,100,4000,"D:\\sis\\C4711\\A.PNG",0.5\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_headers_as_systems_write_them_are_recognised(export, destination, head, row, encoding):
    write(export, "")
    (export / "events.csv").write_text(head + row, encoding=encoding)
    result = ingest_patches(export, destination, UNSAID)
    event = pq.read_table(result.events).to_pylist()[0]
    assert (event["class"], event["x_mm"], event["y_m"]) == ("pit", 100, 4)
    assert np.array_equal(result.roll.read(1936, 2064)[0, :, 136:264], noise(128, 128))
    assert result.notes[0].startswith("columns: ") and "x = " in result.notes[0]


def test_windows_text_is_read(export, destination):
    write(export, "")
    (export / "events.csv").write_bytes((HEAD + "1,Fältchen,100,4000,,,a.png\n").encode("cp1252"))
    events = pq.read_table(ingest_patches(export, destination, UNSAID).events)
    assert events["class"].to_pylist() == ["Fältchen"]


def test_a_column_file_says_what_headers_do_not(export, destination):
    write(export, "pit,8,9,100,4,a.png\n", head="A,x,y,B,C,D\n")
    (export / "columns.yaml").write_text("class: A\nx: B\ny: C\nimage: D\ny_unit: m\nposition: patch\n")
    result = ingest_patches(export, destination, UNSAID)
    assert np.array_equal(result.roll.read(2000, 2128)[0, :, 200:328], noise(128, 128))
    assert "x = 'B' in mm, y = 'C' in m" in result.notes[0] and "first px of the image" in result.notes[0]


def test_a_position_may_be_the_defects_corner(export, destination):
    (export / "columns.json").write_text('{"position": "corner"}')
    result = ingest_patches(write(export, "1,pit,95,3990,10,20,a.png\n"), destination, UNSAID)
    assert np.array_equal(result.roll.read(1936, 2064)[0, :, 136:264], noise(128, 128))
    assert pq.read_table(result.events)["x_mm"].to_pylist() == [95]


@pytest.mark.parametrize(("x", "y"), [(0, 0), (256, 20_000), (250, 10), (-20, 20_030)])
def test_what_hangs_over_the_strip_is_cut(export, destination, x, y):
    roll = ingest_patches(write(export, f"1,pit,{x},{y},,,a.png\n"), destination, UNSAID).roll
    canvas = np.pad(np.full((LINES, WIDTH), 255, np.uint8), 200, constant_values=7)
    top, left = round(y / 2 - 64) + 200, round(x / 0.5 - 64) + 200
    canvas[top : top + 128, left : left + 128] = noise(128, 128)
    own = np.zeros(canvas.shape, bool)
    own[top : top + 128, left : left + 128] = True
    canvas, own = canvas[200:-200, 200:-200], own[200:-200, 200:-200]
    found = roll.read(0, LINES)[0]
    assert np.array_equal(found[own], canvas[own]) and own.any()
    assert (found == 255).mean() > 0.99


def test_of_two_patches_that_overlap_the_later_covers_the_earlier(export, destination):
    rows = "1,pit,100,4000,,,a.png\n2,pit,120,4000,,,b.png\n"
    roll = ingest_patches(write(export, rows, images=("a.png", "b.png")), destination, UNSAID).roll
    found = roll.read(1936, 2064)[0]
    assert np.array_equal(found[:, 136:176], noise(128, 128, 0)[:, :40])
    assert np.array_equal(found[:, 176:304], noise(128, 128, 1))


def test_one_image_of_two_events_is_placed_once(export, destination):
    (export / "columns.json").write_text('{"position": "patch"}')
    rows = "1,pit,100,4000,,,a.png\n2,scratch,100,4000,,,a.png\n"
    result = ingest_patches(write(export, rows), destination, UNSAID)
    assert "2 events, 1 patches" in result.notes[1]


def test_a_patch_across_two_shards_is_whole(export, destination):
    roll = ingest_patches(write(export, "1,pit,100,8192,,,a.png\n"), destination, UNSAID).roll
    assert np.array_equal(roll.read(4032, 4160)[0, :, 136:264], noise(128, 128))


def test_images_are_found_by_the_path_of_another_machine(export, destination):
    names = ("c1/0001.png", "c2/0001.png")
    rows = (
        "1,pit,50,4000,,,C:\\data\\c1\\0001.PNG\n2,pit,50,9000,,,/mnt/c2/0001.png\n3,pit,50,99,,,0001.png\n"
    )
    result = ingest_patches(write(export, rows, images=names), destination, UNSAID)
    images = pq.read_table(result.events)["image"].to_pylist()
    assert images[:2] == ["C:\\data\\c1\\0001.PNG", "/mnt/c2/0001.png"]
    assert images[2] is None  # two have that name


def test_16_bit_patches_make_a_16_bit_roll(export, destination):
    pixels = noise(128, 128).astype(np.uint16) * 16
    Image.fromarray(pixels).save(export / "a.png")
    strip = Strip("coil-1", None, (), None, None, scale=(4095,))
    roll = ingest_patches(write(export, "1,pit,96,3968,,,a.png\n", images=()), destination, strip).roll
    assert np.array_equal(roll.read(1920, 2048)[0, :, 128:256], pixels)
    assert sum((row.y1 - row.y0) * WIDTH - row.not_inspected_px for row in cell_rows(roll)) == 127 * 128


def test_the_canvas_is_cheap_on_disk(export, destination):
    fields = {**FIELDS, "length_m": 100}
    (export / "strip.json").write_text(json.dumps(fields))
    roll = ingest_patches(write(export, "1,pit,96,3968,,,a.png\n"), destination, UNSAID).roll
    size = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    assert size < roll.lines * roll.width / 100


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("1,pit,abc,4000,,,a.png", "row 2: x is 'abc': needed a number"),
        ("1,pit,100,,,,a.png", "row 2: y is empty"),
        ("1,pit,100,nan,,,a.png", "row 2: y is 'nan'"),
        ("1,pit,100,1e999,,,a.png", "row 2: y is '1e999'"),
        ("1,pit,100,4000,-1,,a.png", "row 2: width or length is under 0"),
        ("1,pit,100,4000", "row 2: has 4 of 7 cells"),
        ("1,pit,900,4000,,,a.png", "row 2: x is 900 mm but the strip ends at 256 mm"),
        ("1,pit,100,40000,,,a.png", "row 2: y is 40000 mm but the strip ends at 20000 mm"),
        ("1,pit,-51,4000,,,a.png", "row 2: x is -51 mm"),
        ("1,pit,100,4000,,,broken.png", "row 2: "),
        ("1,pit\x07,100,4000,,,a.png", "row 2: class is"),
        ("1,pit,100,4000,,,a.png\n2,pit,100,4000,,,deep.png", "row 3: deep.png is uint16"),
        ("1,pit,100,4000,,,a.png\n2,pit,100,9000,,,a.png", "row 3: a.png is also in row 2"),
    ],
)
def test_a_row_that_cannot_be_placed_is_named(export, destination, row, named):
    write(export, row + "\n")
    (export / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(export / "deep.png")
    message = refusal(export, destination)
    assert "events.csv" in message and named in message


def test_many_bad_rows_are_counted(export, destination):
    message = refusal(write(export, "1,pit,x,4000,,,a.png\n" * 9), destination)
    assert "row 6" in message and "and 4 more rows" in message and "row 7" not in message


def test_another_scale_is_refused(export, destination):
    head = "class,x,y,image,resolution\n"
    message = refusal(write(export, "pit,100,4000,a.png,0.25\n", head=head), destination)
    assert "row 2: mm_per_px_x is 0.25 but the strip's is 0.5" in message


@pytest.mark.parametrize(
    ("head", "named"),
    [
        ("id,class,x,image\n", "no column found for y among 'id', 'class', 'x', 'image'"),
        ("class,x,y\n", "no column found for image"),
        ("x,y,image\n", "no column found for class or code"),
        ("class,x,y,md,image\n", "both 'y' and 'md' may be y"),
        ("class,x,x,y,image\n", "both 'x' and 'x' may be x"),
        ("\n", "no column found"),
        ("", "no column found"),
    ],
)
def test_columns_that_are_not_clear_are_refused(export, destination, head, named):
    message = refusal(write(export, "1,1,1,1,1\n", head=head), destination)
    assert named in message and "columns.yaml" in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x: X1", "x is 'X1', a header that events.csv has 0 times"),
        ("depth: x", "unknown depth"),
        ("y_unit: inch", "y_unit is 'inch'"),
        ("y_unit: [m]", "y_unit"),
        ("position: middle", "position is 'middle'"),
        ("- x", "must hold fields"),
    ],
)
def test_a_wrong_column_file_is_named(export, destination, text, named):
    (export / "columns.yaml").write_text(text)
    message = refusal(write(export, "1,pit,100,4000,,,a.png\n"), destination)
    assert "columns.yaml" in message and named in message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"width_mm": None}, "width_mm missing"),
        ({"length_m": None}, "--length-m"),
        ({"length_m": "20"}, "length_m is '20'"),
        ({"length_m": -1}, "length_m is -1"),
        ({"length_m": 1e-9}, "256 mm x 1e-09 m"),
        ({"mm_per_px_x": 1e-300}, "px"),
        ({"lighting": ["a", "b"]}, "a patch export holds one"),
        ({"units": "px", "mm_per_px_x": None, "mm_per_line": None}, "units is px"),
        ({"side": None}, "side missing"),
    ],
)
def test_a_strip_of_unknown_size_is_refused(export, destination, fields, named):
    said = {name: value for name, value in {**FIELDS, **fields}.items() if value is not None}
    (export / "strip.json").write_text(json.dumps(said))
    assert named in refusal(write(export, "1,pit,100,4000,,,a.png\n"), destination)


def test_an_export_without_its_images_is_refused(export, destination):
    message = refusal(write(export, "1,pit,100,4000,,,a.png\n", images=()), destination)
    assert "none of the images of its 1 rows is in" in message and "'a.png'" in message
    assert "has a header and no row" in refusal(write(export, ""), destination)


def test_an_image_cut_short_leaves_nothing(export, destination):
    write(export, "1,pit,100,4000,,,a.png\n")
    data = (export / "a.png").read_bytes()
    (export / "a.png").write_bytes(data[: len(data) // 2])
    assert "a.png cannot be read" in refusal(export, destination)


def test_no_roll_comes_without_its_table(export, destination):
    """So the same command may be given again."""
    write(export, "1,pit,100,4000,,,a.png\n")
    table = destination.with_name("coil-1.events.parquet")
    table.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*coil-1.events.parquet"):
        ingest(export, destination, UNSAID)
    assert not destination.exists()

    table.rmdir()
    ingest(export, destination, UNSAID)
    assert pq.read_table(table).num_rows == 1


def test_a_roll_that_cannot_come_to_its_place_takes_its_table_back(export, destination):
    """A plain file stands where the roll before would be put aside."""
    table = destination.with_name("coil-1.events.parquet")
    ingest(write(export, "1,pit,100,4000,,,a.png\n"), destination, UNSAID)
    before = table.read_bytes()
    destination.with_name(".coil-1.replaced.zarr").touch()
    write(export, "1,scratch,100,4000,,,a.png\n")
    with pytest.raises(UserError, match="Not a directory"):
        ingest(export, destination, UNSAID, overwrite=True)
    assert table.read_bytes() == before

    table.unlink()
    with pytest.raises(UserError, match="Not a directory"):
        ingest(export, destination, UNSAID, overwrite=True)
    assert not table.exists()


def test_two_tables_are_refused_but_one_can_be_named(export, destination):
    write(export, "1,pit,100,4000,,,a.png\n")
    (export / "other.csv").write_text("x")
    assert "holds 2 CSV files (events.csv, other.csv)" in refusal(export, destination)
    assert ingest(export / "events.csv", destination, UNSAID).roll.lines == LINES


def test_what_is_said_wins_over_the_file(export, destination):
    write(export, "1,pit,100,4000,,,a.png\n")
    assert ingest(export, destination, UNSAID, length_m=10).roll.lines == 5000
    with pytest.raises(UserError, match="units px cannot be") as error:
        ingest(export, destination, UNSAID, units="px")
    assert error.value.exit_code == USAGE
