# The targets make .venv themselves. PYTHON is any Python of 3.11 or newer; DATA is the folder that holds
# neu_clean/ and mt/, needed by `bench`, `model`, `fast` and `generator` only.
PYTHON ?= python3
DATA ?= $(or $(ROLLSIGHT_DATA),../shared/data)

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:

.PHONY: demo test lint types bench model fast generator

demo: .venv/.runtime
	$(BIN)/inspect demo

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows the map from folders to rollsight.* only over links; see [tool.mypy] in pyproject.toml.
types: .venv/.dev
	mkdir -p build/types/rollsight
	for floor in inspect synth jobs; do ln -sfn ../../../$$floor build/types/rollsight/$$floor; done
	$(BIN)/mypy

# torch goes first: the pin torch==2.13.0 takes the CPU build (2.13.0+cpu) where an index offers one, and
# with it in place nothing that follows can pull another build.
.venv/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@echo "making .venv: torch, then the rest (minutes the first time)"
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.runtime
	$(PIP) --editable '.[dev]'
	touch $@

# Each claim is a script that writes bench/results/NAME.json; RESULTS.md is made from those. Those that train
# for long are started by hand: trainings.py, synth_pilot.py and synth_lift.py (queues that go on where they stopped), weak.py,
# modality.py, prune.py, synth_data.py and synth_picture.py.
TRAINING := $(addprefix bench/,trainings.py weak.py modality.py prune.py synth_pilot.py synth_lift.py synth_data.py synth_picture.py)
BENCHES := $(filter-out bench/report.py bench/_% $(TRAINING),$(wildcard bench/*.py))
bench: .venv/.dev
	set -e; for script in $(BENCHES); do echo "$$script"; ROLLSIGHT_DATA=$(DATA) $(BIN)/python $$script; done
	$(BIN)/python bench/report.py

# The recipe of the shipped model: simulated strip with known truth; a first training with a strong term for small
# objects (without it the pits are never learned), a second on whole scenes of 256 px, padded as in `evaluate`,
# with a weak one (with a strong one inclusions come out too large), a third on the IoU itself (Lovasz); test figures
# on the card. Run again, it goes on where it stopped; about three and a half hours of one core. Another number of
# threads gives a sibling: sums round otherwise. What shows the training's images stays behind: they are not ours.
PLANT := build/model/plant
FIRST := $(PLANT)/models/hot-strip-0
SECOND := $(PLANT)/models/hot-strip-1
MODEL := $(PLANT)/models/hot-strip-2
TRAIN_ROLLS := $(foreach n,00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 15,$(PLANT)/rolls/train-$n.zarr)
NEU := $(DATA)/neu_clean
SOURCES := --home $(PLANT) --data $(NEU) --share 3 --data $(PLANT)/rolls --share 1 --threads 2
NOTES := --note "Trained on scenes of NEU-Seg (K. Song, Y. Yan, NEU surface defect database) and on simulated strip." \
    --note "No licence file comes with NEU-Seg." \
    --note "The classes pit, roll_mark, scale and edge_crack were learned from simulated strip only: they have never seen real strip."

model: $(MODEL)/.evaluated
	rm -rf inspect/default_model
	mkdir inspect/default_model
	cp $(MODEL)/card.json $(MODEL)/README.md $(MODEL)/*.safetensors $(MODEL)/*.onnx inspect/default_model/

# A roll is whole when it is there under its name: the writer renames it into place. Seeds 100 to 115.
$(PLANT)/rolls/train-%.zarr: | .venv/.runtime
	$(BIN)/inspect simulate train-$* --length-m 10 --seed 1$* --density 3 --no-lamp-failure --home $(PLANT)

$(FIRST)/card.json: | .venv/.runtime $(TRAIN_ROLLS)
	$(BIN)/inspect train hot-strip-0 $(SOURCES) --steps 1700 --small-weight 0.5 --fresh-rate 1

$(SECOND)/card.json: | $(FIRST)/card.json
	$(BIN)/inspect train hot-strip-1 $(SOURCES) --init hot-strip-0 --exhaustive $(NEU) \
	    --steps 2150 --crop-px 256 --focal-gamma 0.5 --small-weight 0.1

$(MODEL)/card.json: | $(SECOND)/card.json
	$(BIN)/inspect train hot-strip-2 $(SOURCES) --init hot-strip-1 --exhaustive $(NEU) \
	    --steps 450 --crop-px 256 --learning-rate 0.0005 --loss lovasz --focal-gamma 0.5 --small-weight 0.2 \
	    $(NOTES)

$(MODEL)/.evaluated: $(MODEL)/card.json
	$(BIN)/inspect evaluate hot-strip-2 --home $(PLANT) --data $(NEU) --split test --card
	touch $@

# The recipe of the shipped fast model, about an hour of one core: scenes and simulated strip, taught by the shipped
# default; then as much simulated strip as scenes, half of the crops around a defect of each class alike and a strong term
# for small ones (after the first training alone none of pit, roll_mark, scale and edge_crack is found); then mostly scenes.
FAST := $(PLANT)/models/fast-strip
TAUGHT := --net fast --teacher default --focal-gamma 0.5

fast: $(FAST)-2/.evaluated
	rm -rf inspect/fast_model
	mkdir inspect/fast_model
	cp $(FAST)-2/card.json $(FAST)-2/README.md $(FAST)-2/*.safetensors $(FAST)-2/*.onnx inspect/fast_model/

$(FAST)-0/card.json: | .venv/.runtime $(TRAIN_ROLLS)
	$(BIN)/inspect train fast-strip-0 $(SOURCES) $(TAUGHT) --exhaustive $(NEU) \
	    --steps 3600 --learning-rate 0.003 --fresh-rate 1 --small-weight 0.2

$(FAST)-1/card.json: | $(FAST)-0/card.json
	$(BIN)/inspect train fast-strip-1 $(subst --share 3,--share 1,$(SOURCES)) $(TAUGHT) --init fast-strip-0 \
	    --steps 1500 --learning-rate 0.003 --small-weight 0.5 --balanced 0.5

$(FAST)-2/card.json: | $(FAST)-1/card.json
	$(BIN)/inspect train fast-strip-2 $(SOURCES) $(TAUGHT) --init fast-strip-1 --exhaustive $(NEU) \
	    --steps 1200 --learning-rate 0.002 --small-weight 0.2 --balanced 0.2 $(NOTES) \
	    --note "Taught by the shipped default model."

$(FAST)-2/.evaluated: $(FAST)-2/card.json
	$(BIN)/inspect evaluate fast-strip-2 --home $(PLANT) --data $(NEU) --split test --card
	touch $@

# The recipe of the shipped generic generator: the classes of both sets whose defects fit into a patch. Run again, it
# goes on where it stopped; about a quarter of an hour of one core, and as long for the figures on its card. The sheets
# and the curve in fitting/ stay behind: they show the training's images, which are not ours.
GENERATOR := $(PLANT)/generators/strip-0

generator: $(GENERATOR)/card.json
	rm -rf synth/default_generator
	mkdir synth/default_generator
	cp $(GENERATOR)/card.json $(GENERATOR)/README.md $(GENERATOR)/*.safetensors synth/default_generator/

$(GENERATOR)/card.json: | .venv/.runtime
	$(BIN)/inspect synth generic strip-0 --labels $(NEU) --labels $(DATA)/mt --steps 1500 --threads 1 --home $(PLANT) \
	    --note "Trained on scenes of NEU-Seg (K. Song, Y. Yan, NEU surface defect database) and on magnetic tiles (Y. Huang, C. Qiu, K. Yuan, Surface defect saliency of magnetic tile, The Visual Computer 2020)." \
	    --note "No licence file comes with either; the second says that it is welcome to be used with citation."
