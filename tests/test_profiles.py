import dataclasses

import pytest

from nbhelpers.profiles import PROFILES, ProfileError, get_profile, parse_overrides


def test_profiles_of_the_design_exist_and_quick_is_the_shipped_model():
    assert set(PROFILES) == {"smoke", "quick", "thorough", "gpt2"}
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
        ("comparator_sparsities", "0.5,0.9", (0.5, 0.9)),
        ("data", "my reviews.csv", "my reviews.csv"),
    ],
)
def test_overrides_are_converted(field, text, value):
    changed = get_profile("smoke", **{field: text})
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    others = {f.name for f in dataclasses.fields(changed)} - {field}
    assert all(getattr(changed, name) == getattr(PROFILES["smoke"], name) for name in others)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", "banana"),
        ("epochs", "1.5"),
        ("epochs", 0),
        ("epochs", True),
        ("batch_size", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("head_share", 1.1),
        ("main_sparsity", 1.0),
        ("main_sparsity", 0.0),
        ("sparsities", "0.5,x"),
        ("sparsities", ""),
        ("sparsities", 0.5),
        ("student_layers", "0"),
        ("temperatures", "-1"),
        ("precision", "int8"),
        ("model", 3),
        ("seeds", 0),
        ("seeds", "1.5"),
        ("seeds", "0,1"),
        ("recovery_learning_rates", ""),
        ("recovery_learning_rates", 5e-4),
        ("recovery_learning_rates", "0,1e-3"),
        ("recovery_learning_rates", (1e-3, float("inf"))),
        ("comparator_sparsities", "0.9,1.0"),
        ("comparator_sparsities", ()),
    ],
)
def test_impossible_values_are_refused_and_the_field_is_named(field, value):
    with pytest.raises(ProfileError, match=field) as error:
        get_profile("smoke", **{field: value})
    assert "\n" not in str(error.value)


def test_the_main_sparsity_is_one_at_which_models_are_recovered():
    assert get_profile("smoke", recovery_sparsities="0.5,0.7", main_sparsity="0.7").main_sparsity == 0.7
    with pytest.raises(ProfileError, match=r"main_sparsity is 0\.9: it takes one of \(0\.5, 0\.7\)"):
        get_profile("smoke", recovery_sparsities="0.5,0.7")


def test_the_reference_reports_have_several_seeds_and_every_profile_has_a_choice_of_recovery_rates():
    assert get_profile("thorough").seeds == 3
    assert all(len(profile.recovery_learning_rates) > 1 for profile in PROFILES.values())


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(ProfileError, match="smoke, quick, thorough, gpt2"):
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
    for text in ("epochs", "=2"):
        with pytest.raises(ProfileError, match="field=value"):
            parse_overrides(text)


def test_description_names_what_was_changed():
    assert get_profile("smoke").description == "as defined"
    assert get_profile("smoke", epochs=7).description == "epochs=7"


def test_a_profile_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_profile("smoke").epochs = 5
