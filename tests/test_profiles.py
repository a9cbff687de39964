"""Profiles: the named ones, overrides, and errors in one line."""

import dataclasses
from pathlib import Path

import pytest

from nbhelpers.profiles import (
    KINDS,
    PROFILES,
    PRUNERS,
    RESCORED,
    TYPES,
    ProfileError,
    get_profile,
    overrides_of,
    parse_overrides,
)

SCORES = ("magnitude", "movement", "gradient", "merged", "taylor")


def test_profiles_of_the_design_exist_and_quick_is_the_shipped_model():
    assert {"smoke", "quick", "thorough", "gpt2"} <= set(PROFILES)
    assert all(name == profile.name for name, profile in PROFILES.items())
    assert (get_profile("quick").model, get_profile("quick").data) == ("mini", "movie-reviews")


def test_gpt2_has_the_recipe_of_the_source_work():
    profile = get_profile("gpt2")
    assert (profile.epochs, profile.learning_rate, profile.batch_size) == (3, 5e-5, 8)
    assert profile.distill_batch_size == 16
    # Downloads are pinned to a commit.
    assert len(profile.model_revision) == len(profile.data_revision) == 40


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("epochs", "2", 2),
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", 1, 1.0),
        ("sparsities", "0.5,0.9", (0.5, 0.9)),
        ("sparsities", [0.5, 0.9], (0.5, 0.9)),
        ("student_layers", "3", (3,)),
        ("seeds", "3", 3),
        ("recovery_learning_rates", "1e-4,0.001", (1e-4, 1e-3)),
        ("recovery_learning_rates", "5e-4", (5e-4,)),
        ("recovery_epochs", "2", 2.0),
        ("comparators", "wanda, sparsegpt", ("wanda", "sparsegpt")),
        ("comparators", "", ()),
        ("budget_steps", "", ()),
        ("data", "my reviews.csv", "my reviews.csv"),
    ],
)
def test_overrides_are_converted(field, text, value):
    changed = get_profile("smoke", **{field: text})
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    others = {f.name for f in dataclasses.fields(changed)} - {field}
    assert all(getattr(changed, name) == getattr(PROFILES["smoke"], name) for name in others)


WRONG = {
    int: ("many", "1.5", "1e3", "", "1,2", "-1", None, 2.0, True, "9" * 5000),
    float: ("much", "", "0.1,0.2", "nan", "-1", "-inf", None, True, (0.5,)),
    str: ("", "  ", "a\0b", "two\nlines", "caf\udce9", None, 3, Path("x")),
    tuple[float, ...]: (",x", "0.5;0.9", "0.5 0.9", "nan", "-0.1", "0.5,0.5", None, 0.5, [None], [True]),
    tuple[int, ...]: ("1.5", "x", "0", "-1", "1,1", None, 1, [2.0]),
    tuple[str, ...]: ("nonsense", "taylor,taylor", "Taylor", None, 3, [None], [True]),
}


@pytest.mark.parametrize("field", [field for field in TYPES if field != "name"])
def test_every_field_refuses_what_is_not_of_its_kind(field):
    for value in WRONG[TYPES[field]]:
        with pytest.raises(ProfileError, match=rf"^`{field}` must be \w.* \(got .*\)$") as error:
            get_profile("smoke", **{field: value})
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("epochs", "banana", "a whole number (got 'banana')"),
        ("epochs", 0, "a whole number of at least 1 (got 0)"),
        ("learning_rate", float("inf"), "a positive number (got inf)"),
        ("head_share", 1.1, "a share between 0 and 1 (got 1.1)"),
        ("main_sparsity", "1", "a sparsity above 0 and below 1 (got 1.0)"),
        ("sparsities", "0.9,0", "a sparsity above 0 and below 1 (got (0.9, 0.0))"),
        ("sparsities", "", "numbers separated by commas, at least one (got ())"),
        ("student_layers", "0", "whole numbers of at least 1 (got (0,))"),
        ("student_layers", "", "whole numbers separated by commas, at least one (got ())"),
        ("budget_steps", "9,0", "a whole number of at least 1 (got (9, 0))"),
        ("recovery_epochs", "0", "a positive number (got 0.0)"),
        ("comparators", "wanda,obd", f"of {', '.join(PRUNERS)} (got ('wanda', 'obd'))"),
        ("scores", (*SCORES, "wanda"), f"of {', '.join(RESCORED)} (got {(*SCORES, 'wanda')})"),
        ("scores", "", "names separated by commas, at least one (got ())"),
        ("scores", SCORES[1:], f"a list with {', '.join(SCORES)} (got {SCORES[1:]})"),
        ("temperatures", "2,2", "distinct values (got (2.0, 2.0))"),
        ("precision", "int8", "auto, no or bf16 (got 'int8')"),
        ("data", "", "a name or path, in UTF-8 (got '')"),
        ("recovery_sparsities", "0.5,0.7", "one of recovery_sparsities (0.5, 0.7) (got 0.9)"),
    ],
)
def test_an_error_says_what_is_expected_and_what_was_found(field, value, expected):
    named = "main_sparsity" if field == "recovery_sparsities" else field
    with pytest.raises(ProfileError) as error:
        get_profile("smoke", **{field: value})
    assert str(error.value) == f"`{named}` must be {expected}"


def test_every_field_has_a_kind_in_words_and_scores_may_be_more_than_the_five():
    assert set(TYPES.values()) == set(KINDS)
    more = ("random", *reversed(SCORES), "merged_with_taylor")
    assert get_profile("smoke", scores=",".join(more)).scores == more
    assert set(RESCORED) == set(PRUNERS) - {"fisher", "movement_first_order", "wanda", "sparsegpt"}


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(ProfileError, match=f"must be one of {', '.join(PROFILES)} .got 'nonsense'."):
        get_profile("nonsense")
    with pytest.raises(ProfileError, match="did you mean 'epochs'"):
        get_profile("smoke", epoch=2)
    with pytest.raises(ProfileError, match="did you mean 'recovery_learning_rates'"):
        get_profile("smoke", recovery_learning_rate=1e-3)
    with pytest.raises(ProfileError, match="no field 'name'"):
        get_profile("smoke", name="quick")


def test_overrides_text_is_read_as_a_shell_would():
    assert parse_overrides("") == {}
    assert parse_overrides("epochs=2 learning_rate=1e-3") == {"epochs": "2", "learning_rate": "1e-3"}
    assert parse_overrides("data='my reviews/a=b.csv'") == {"data": "my reviews/a=b.csv"}
    for text in ("epochs", "=2", "epochs='2", "data=a b\\"):
        with pytest.raises(ProfileError, match=r"must be field=value.* \(got "):
            parse_overrides(text)


def test_paths_on_a_command_line_become_absolute_and_built_in_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("reviews.csv", "mini"):
        (tmp_path / name).touch()
    found = overrides_of(["data=reviews.csv", "model=mini", "epochs=2"])
    assert found == {"data": str(tmp_path / "reviews.csv"), "model": "mini", "epochs": "2"}
    assert overrides_of(["data=someone/reviews"]) == {"data": "someone/reviews"}


def test_description_names_what_was_changed():
    assert get_profile("smoke").description == "as defined"
    assert get_profile("smoke", epochs=7).description == "epochs=7"


def test_a_profile_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_profile("smoke").epochs = 5
