"""What a licence asks for is known before anything is published, and every condition can be met."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from builders import random_plan, save_metadata_release, tiny_architecture, tiny_config

from loram_hub.cards import make_card
from loram_hub.errors import InvalidRequestError
from loram_hub.licences import (
    CHANGES,
    LICENCES,
    Licence,
    declared_licence,
    duties,
    licence_documents,
    licence_of,
    notice_file,
)

BY_ID = {licence.id: licence for licence in LICENCES}

# Read off the models' own pages, not off the patterns.
PUBLISHED_UNDER = {
    "meta-llama/Llama-2-13b-hf": "llama2",
    "meta-llama/Meta-Llama-3-8B": "llama3",
    "meta-llama/Llama-3.1-70B": "llama3.1",
    "meta-llama/Meta-Llama-3.1-8B-Instruct": "llama3.1",
    "meta-llama/Llama-3.2-1B": "llama3.2",
    "meta-llama/Llama-3.3-70B-Instruct": "llama3.3",
    "meta-llama/Llama-4-Scout-17B-16E": "llama4",
    "google/gemma-2-9b": "gemma",
    "google/gemma-3-4b-pt": "gemma",
    "google/gemma-4-31B": "apache-2.0",
    "Qwen/Qwen2-7B": "apache-2.0",
    "Qwen/Qwen2-72B": "tongyi-qianwen",
    "Qwen/Qwen1.5-14B": "tongyi-qianwen",
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-7B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-Coder-32B": "apache-2.0",
    "Qwen/Qwen2.5-3B": "qwen-research",
    "Qwen/Qwen2.5-72B-Instruct": "qwen",
    "Qwen/Qwen3-8B": "apache-2.0",
    "mistralai/Mistral-7B-v0.3": "apache-2.0",
    "mistralai/Mistral-Small-24B-Base-2501": "apache-2.0",
    "allenai/OLMo-2-1124-7B": "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M": "apache-2.0",
    "HuggingFaceTB/SmolLM3-3B": "apache-2.0",
    "microsoft/Phi-3-mini-4k-instruct": "mit",
    "microsoft/phi-4": "mit",
}


@pytest.mark.parametrize(("base", "licence"), PUBLISHED_UNDER.items())
def test_a_well_known_base_has_its_owners_licence(base: str, licence: str) -> None:
    assert licence_of(base).id == licence


def test_no_base_has_two_licences() -> None:
    for base in PUBLISHED_UNDER:
        assert len([licence for licence in LICENCES if re.fullmatch(licence.models, base)]) == 1, base


@pytest.mark.parametrize(
    ("copy", "licence"),
    [("unsloth/Llama-3.1-8B", "llama3.1"), ("someone/gemma-2-9b", "gemma"), ("Meta-Llama-3-8B", "llama3")],
)
def test_a_copy_elsewhere_keeps_a_binding_licence(copy: str, licence: str) -> None:
    assert licence_of(copy).id == licence


@pytest.mark.parametrize(
    "base",
    ["org/base", "base", "mistralai/Mistral-Large-Instruct-2411", "someone/Qwen2.5-7B-tuned", "Qwen/Qwen1.5-0.5B"],
)
def test_an_unknown_base_needs_a_word_from_the_user(base: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"not known here.*license="):
        licence_of(base)

    assert licence_of(base, declared="Apache-2.0").id == "apache-2.0"


def test_a_binding_licence_cannot_be_declared_away() -> None:
    with pytest.raises(InvalidRequestError, match=r"'mit'.*Llama 3\.1 Community License"):
        licence_of("meta-llama/Llama-3.1-8B", declared="mit")

    assert licence_of("meta-llama/Llama-3.1-8B", declared="llama3.1").id == "llama3.1"
    assert licence_of("Qwen/Qwen3-8B", declared="mit").id == "mit", "a permissive licence is only what is assumed"


LLAMA_TEXT = """\
LLAMA 3.1 COMMUNITY LICENSE AGREEMENT
Llama 3.1 Version Release Date: July 23, 2024

"Agreement" means the terms and conditions for use, reproduction, distribution and modification of the Llama Materials.
"""
APACHE_TEXT = """\
                                 Apache License
                           Version 2.0, January 2004
                        http://www.apache.org/licenses/
"""
MIT_TEXT = """\
MIT License

Copyright (c) 2024 Someone

Permission is hereby granted, free of charge, to any person obtaining a copy of this software
"""

# Everything that can point to a licence that binds, and how the refusal names it.
POINTERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "owner": ("meta-llama/Llama-3.1-8B", {}, "its owner publishes it"),
    "name": ("alice/Llama-3.1-8B", {}, "it is named like a model"),
    "name of a folder": ("Llama-3.1-8B", {}, "it is named like a model"),
    "card": ("alice/renamed-base", {"on_card": "llama3.1"}, "its card declares"),
    "card in capitals": ("alice/renamed-base", {"on_card": " Llama3.1 "}, "its card declares"),
    "text": ("alice/renamed-base", {"documents": {"LICENSE": LLAMA_TEXT}}, "its licence file 'LICENSE' holds the text"),
    "text in Markdown": (
        "alice/renamed-base",
        {"documents": {"license.md": "# **Llama 3.1** Community\nLicense Agreement"}},
        "its licence file 'license.md' holds",
    ),
    "text beside another": (
        "alice/renamed-base",
        {"documents": {"LICENSE": APACHE_TEXT, "LICENSE-MODEL": LLAMA_TEXT}},
        "its licence file 'LICENSE-MODEL' holds",
    ),
    "text of a base whose card says less": (
        "alice/renamed-base",
        {"on_card": "mit", "documents": {"LICENSE": LLAMA_TEXT}},
        "its licence file 'LICENSE' holds",
    ),
    "text of a base whose owner's models are free": (
        "mistralai/Mistral-7B-v0.3",
        {"documents": {"LICENSE": LLAMA_TEXT}},
        "its licence file 'LICENSE' holds",
    ),
}


@pytest.mark.parametrize("declared", ["cc0-1.0", "apache-2.0", "gemma", "llama3", "my-licence-1.0", "other"])
@pytest.mark.parametrize("pointer", POINTERS)
def test_nothing_else_can_be_declared_where_something_points_to_a_licence_that_binds(
    pointer: str, declared: str
) -> None:
    base, evidence, says = POINTERS[pointer]

    with pytest.raises(InvalidRequestError, match="cannot leave") as refused:
        licence_of(base, declared=declared, **evidence)

    for part in (base, repr(declared), says, "Llama 3.1 Community License (llama3.1)", "license='llama3.1'"):
        assert part in str(refused.value)


@pytest.mark.parametrize("pointer", POINTERS)
def test_the_licence_that_binds_can_always_be_declared(pointer: str) -> None:
    base, evidence, _ = POINTERS[pointer]

    assert licence_of(base, declared="Llama3.1", **evidence) is BY_ID["llama3.1"]


@pytest.mark.parametrize(
    "pointer", [name for name, (_, evidence, _) in POINTERS.items() if evidence.get("on_card") != "mit"]
)
def test_what_points_to_a_licence_that_binds_is_enough(pointer: str) -> None:
    base, evidence, _ = POINTERS[pointer]

    assert licence_of(base, **evidence) is BY_ID["llama3.1"]


@pytest.mark.parametrize("licence", [licence for licence in LICENCES if licence.binds], ids=lambda licence: licence.id)
def test_every_licence_that_binds_is_known_by_its_text_and_by_its_id_on_a_card(licence: Licence) -> None:
    documents = {"LICENSE": f"{licence.text_holds}\n\nBy using the model you agree."}

    assert licence_of("alice/base", documents=documents) is licence
    assert licence_of("alice/base", on_card=licence.id) is licence
    for evidence in ({"documents": documents}, {"on_card": licence.id}):
        with pytest.raises(InvalidRequestError, match="cannot leave"):
            licence_of("alice/base", declared="mit", **evidence)


@pytest.mark.parametrize(
    ("base", "evidence", "says"),
    [
        ("meta-llama/Llama-3.1-8B", {}, "its owner publishes it"),
        ("alice/Llama-3.1-8B", {}, "it is named like a model"),
        ("alice/renamed-base", {"documents": {"LICENSE": LLAMA_TEXT}}, "its licence file 'LICENSE' holds"),
    ],
)
def test_a_card_that_says_less_than_the_rest_leaves_the_word_to_the_user(
    base: str, evidence: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=r"The card of .* 'mit', but .*license='llama3\.1'") as refused:
        licence_of(base, on_card="mit", **evidence)

    assert says in str(refused.value)
    assert licence_of(base, on_card="mit", declared="llama3.1", **evidence).id == "llama3.1"


def test_of_several_licences_that_bind_owner_card_text_and_name_have_the_word_in_this_order() -> None:
    text = {"LICENSE": "Gemma Terms of Use"}

    assert licence_of("alice/Llama-3.1-8B").id == "llama3.1"
    assert licence_of("alice/Llama-3.1-8B", documents=text).id == "gemma"
    assert licence_of("alice/Llama-3.1-8B", documents=text, on_card="llama2").id == "llama2"
    assert licence_of("meta-llama/Llama-3.1-8B", documents=text).id == "llama3.1"
    with pytest.raises(InvalidRequestError, match="owner publishes"):
        licence_of("meta-llama/Llama-3.1-8B", documents=text, on_card="llama2")
    with pytest.raises(InvalidRequestError, match="its card declares the Llama 2"):
        licence_of("alice/Llama-3.1-8B", on_card="llama2", declared="llama3.1")


def test_of_two_texts_that_bind_either_can_be_declared_and_nothing_else() -> None:
    documents = {"LICENSE-GEMMA": "Gemma Terms of Use", "LICENSE-LLAMA": LLAMA_TEXT}

    assert licence_of("alice/merged", declared="llama3.1", documents=documents).id == "llama3.1"
    assert licence_of("alice/merged", declared="gemma", documents=documents).id == "gemma"
    with pytest.raises(InvalidRequestError, match=r"license='gemma' or 'llama3\.1'"):
        licence_of("alice/merged", declared="mit", documents=documents)


@pytest.mark.parametrize(
    ("base", "options", "licence"),
    [
        ("alice/nothing-special", {"documents": {"LICENSE": APACHE_TEXT}}, "apache-2.0"),
        ("alice/nothing-special", {"documents": {"LICENSE": APACHE_TEXT}, "declared": "apache-2.0"}, "apache-2.0"),
        ("alice/nothing-special", {"documents": {"LICENSE": MIT_TEXT}, "on_card": "mit"}, "mit"),
        ("alice/nothing-special", {"documents": {"LICENSE": MIT_TEXT}, "on_card": "mit", "declared": "mit"}, "mit"),
        ("alice/nothing-special", {"documents": {"LICENSE.md": "# The MIT License (MIT)"}}, "mit"),
        ("alice/nothing-special", {"on_card": "mit", "declared": "cc-by-4.0"}, "cc-by-4.0"),
        ("alice/nothing-special", {"on_card": "apache-2.0", "declared": "llama3.1"}, "llama3.1"),
        ("alice/nothing-special", {"on_card": "cc-by-nc-4.0"}, "cc-by-nc-4.0"),
        ("alice/nothing-special", {"on_card": "mit", "documents": {"README.md": LLAMA_TEXT}}, "mit"),
        ("alice/gemma-4-31B", {"on_card": "apache-2.0", "documents": {"LICENSE": APACHE_TEXT}}, "apache-2.0"),
        ("alice/not-Llama-3.1-8B", {"on_card": "mit"}, "mit"),
        ("Qwen/Qwen3-8B", {"on_card": "apache-2.0", "documents": {"LICENSE": APACHE_TEXT}}, "apache-2.0"),
        ("google/gemma-2-9b", {"on_card": "gemma", "documents": {}}, "gemma"),
    ],
)
def test_a_base_that_nothing_binds_raises_no_false_alarm(base: str, options: dict[str, Any], licence: str) -> None:
    assert licence_of(base, **options).id == licence


@pytest.mark.parametrize(
    "documents",
    [
        {"LICENSE": "Modified MIT License\n\nPermission is hereby granted, free of charge, to any person"},
        {"LICENSE": "Some Model License\n\nIt is based on the Apache License, with additional terms."},
        {"LICENSE": "Some Model License", "LICENSE-CODE": APACHE_TEXT},
        {"LICENSE": ""},
    ],
)
def test_a_text_that_only_resembles_a_free_licence_tells_none(documents: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match="not known here"):
        licence_of("alice/nothing-special", documents=documents)


@pytest.mark.parametrize("base", ["meta-llama/Llama-3.1-8B", "alice/renamed-base"])
def test_a_card_is_not_made_for_another_licence_than_the_one_that_lies_in_the_folder(tmp_path: Path, base: str) -> None:
    plan = random_plan(tiny_architecture())
    folder = save_metadata_release(tmp_path / "release", tiny_config(), plan, base_id=base)
    (folder / "LICENSE").write_text(LLAMA_TEXT)

    with pytest.raises(InvalidRequestError, match=r"'cc0-1\.0'.*Llama 3\.1 Community License"):
        make_card(folder, license="cc0-1.0")
    assert "license: llama3.1\n" in make_card(folder).text


def test_a_card_is_not_made_for_another_licence_than_the_one_that_will_be_published_with_it(tmp_path: Path) -> None:
    plan = random_plan(tiny_architecture())
    folder = save_metadata_release(tmp_path / "release", tiny_config(), plan, base_id="alice/renamed-base")

    with pytest.raises(InvalidRequestError, match=r"'cc0-1\.0'.*Llama 3\.1 Community License"):
        make_card(folder, license="cc0-1.0", documents={"LICENSE": LLAMA_TEXT})
    assert "license: cc0-1.0\n" in make_card(folder, license="cc0-1.0").text


def test_a_text_that_nothing_is_known_of_is_not_called_a_copy_of_the_licence() -> None:
    unknown, known = licence_of("org/base", declared="cc0-1.0"), BY_ID["mit"]

    (text, _), (copy, _) = (
        duties(licence, repo_name="org/x", documents={"LICENSE": MIT_TEXT}, card="") for licence in (unknown, known)
    )
    (missing, _) = duties(unknown, repo_name="org/x", documents={"LICENSE": " "}, card="")

    assert text.met
    assert text.what == "a licence file travels along (its text was not compared)"
    assert copy.met
    assert copy.what == "a copy of the MIT License travels along"
    assert not missing.met


def test_a_declared_licence_that_is_not_known_here_asks_for_its_text_alone() -> None:
    listed, unlisted = licence_of("org/base", declared="cc-by-4.0"), licence_of("org/base", declared="my-licence-1.0")

    assert listed.metadata == {"license": "cc-by-4.0"}
    assert unlisted.metadata == {"license": "other", "license_name": "my-licence-1.0", "license_link": "LICENSE"}
    assert not listed.binds
    assert _unmet(listed, documents={"LICENSE": "text"}, card="---\nlicense: cc-by-4.0\n---\n") == []


@pytest.mark.parametrize("declared", ["other", "unknown", "", "a b", "x\nbase_model: y", "<script>", "é" * 3, "a" * 65])
def test_what_names_no_licence_is_refused(declared: str) -> None:
    with pytest.raises(InvalidRequestError, match="names none"):
        licence_of("org/base", declared=declared)


@pytest.mark.parametrize(
    ("metadata", "declared"),
    [
        ({"license": "mit"}, "mit"),
        ({"license": "other", "license_name": "qwen"}, "qwen"),
        ({"license": "other"}, None),
        ({"license": ["mit", "apache-2.0"]}, None),
        ({}, None),
    ],
)
def test_a_bases_card_declares_its_licence(metadata: dict[str, object], declared: str | None) -> None:
    assert declared_licence(metadata) == declared


# A repository for each licence with everything that it asks for, written by hand.
COMPLETE: dict[str, tuple[str, dict[str, str], str]] = {
    "llama2": (
        "org/anything",
        {
            "LICENSE.txt": "LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date: July 18, 2023",
            "Notice": "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
            "All Rights Reserved.",
            "USE_POLICY.md": "# Llama 2 Acceptable Use Policy",
        },
        "---\nlicense: llama2\n---\n# x\n",
    ),
    "llama3": (
        "org/Llama-3-8B-LoRAM",
        {
            "LICENSE": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT",
            "NOTICE.txt": "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta\n"
            "Platforms, Inc. All Rights Reserved.",
            "USE_POLICY.md": "policy",
        },
        "---\nlicense: llama3\n---\nBuilt with Meta Llama 3\n",
    ),
    "llama3.1": (
        "org/Llama-3.1-70B-LoRAM",
        {
            "LICENSE": "**LLAMA 3.1 COMMUNITY LICENSE AGREEMENT**",
            "Notice": "“Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. "
            "All Rights Reserved.”",
            "USE_POLICY.md": "policy",
        },
        "---\nlicense: llama3.1\n---\n**Built with Llama**\n",
    ),
    "gemma": (
        "org/anything",
        {
            "LICENSE": "# Gemma Terms of Use\n",
            "Notice": "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms",
        },
        f"---\nlicense: gemma\n---\n{CHANGES} pruned. See https://ai.google.dev/gemma/prohibited_use_policy\n",
    ),
    "qwen": (
        "org/anything",
        {
            "LICENSE": "Qwen LICENSE AGREEMENT\n\nQwen LICENSE AGREEMENT Release Date: September 19, 2024",
            "Notice": "Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights "
            "Reserved.",
        },
        f"---\nlicense: other\nlicense_name: qwen\n---\nImproved using Qwen. {CHANGES} pruned.\n",
    ),
    "apache-2.0": (
        "org/anything",
        {"LICENSE": "                                 Apache License\n                           Version 2.0"},
        f"---\nlicense: apache-2.0\n---\n{CHANGES} pruned.\n",
    ),
    "mit": (
        "org/anything",
        {"LICENSE": "MIT License\n\nPermission is hereby granted, free of charge, to any person"},
        "---\nlicense: mit\n---\n",
    ),
}


def _unmet(
    licence: Licence, *, repo_name: str = "org/x", documents: dict[str, str] | None = None, card: str = ""
) -> list[str]:
    looked_at = duties(licence, repo_name=repo_name, documents=documents or {}, card=card)
    assert looked_at
    return [duty.what for duty in looked_at if not duty.met]


@pytest.mark.parametrize("name", COMPLETE)
def test_a_complete_repository_meets_every_duty(name: str) -> None:
    repo_name, documents, card = COMPLETE[name]

    assert _unmet(BY_ID[name], repo_name=repo_name, documents=documents, card=card) == []


@pytest.mark.parametrize("name", COMPLETE)
def test_each_missing_file_is_one_unmet_duty_that_says_how_to_meet_it(name: str) -> None:
    repo_name, documents, card = COMPLETE[name]

    for missing in documents:
        rest = {key: text for key, text in documents.items() if key != missing}
        unmet = [duty for duty in duties(BY_ID[name], repo_name=repo_name, documents=rest, card=card) if not duty.met]
        assert len(unmet) == 1, missing
        assert missing.split(".")[0].lower() in unmet[0].how.lower()


@pytest.mark.parametrize("name", COMPLETE)
def test_an_empty_card_meets_nothing_that_belongs_on_a_card(name: str) -> None:
    repo_name, documents, _ = COMPLETE[name]
    licence = BY_ID[name]

    unmet = _unmet(licence, repo_name=repo_name, documents=documents, card="# empty\n")

    on_card = (
        1 + bool(licence.display) + licence.states_changes + bool(licence.use_policy and not licence.has_policy_file)
    )
    assert len(unmet) == on_card


@pytest.mark.parametrize(
    ("name", "is_good"),
    [
        ("org/Llama-3.1-70B-LoRAM-Stru-0.85-nf4", True),
        ("Llama-tuned", True),
        ("org/llama-70b-loram-0.85", False),
        ("org/My-Llama-3.1-8B", False),
        ("Llama-org/model", False),
    ],
)
def test_a_derivative_of_llama_begins_with_its_name(name: str, is_good: bool) -> None:
    _, documents, card = COMPLETE["llama3.1"]

    unmet = _unmet(BY_ID["llama3.1"], repo_name=name, documents=documents, card=card)

    assert unmet == ([] if is_good else ["the name begins with 'Llama'"])


@pytest.mark.parametrize(("name", "is_good"), [("org/Llama-3-x", True), ("org/Llama3-x", True), ("org/Llama-x", False)])
def test_a_derivative_of_llama_3_begins_with_name_and_number(name: str, is_good: bool) -> None:
    _, documents, card = COMPLETE["llama3"]

    assert (_unmet(BY_ID["llama3"], repo_name=name, documents=documents, card=card) == []) is is_good


def test_another_licences_text_is_no_copy_of_this_one() -> None:
    documents = {**COMPLETE["llama3.1"][1], "LICENSE": COMPLETE["apache-2.0"][1]["LICENSE"]}

    unmet = _unmet(BY_ID["llama3.1"], repo_name="Llama", documents=documents, card=COMPLETE["llama3.1"][2])

    assert unmet == ["a copy of the Llama 3.1 Community License travels along"]


def test_the_line_to_display_counts_in_the_text_not_in_the_metadata() -> None:
    card = "---\nlicense: llama3.1\ntags: [Built with Llama]\n---\n# x\n"

    unmet = _unmet(BY_ID["llama3.1"], repo_name="Llama-x", documents=COMPLETE["llama3.1"][1], card=card)

    assert unmet == ["the card shows 'Built with Llama'"]


@pytest.mark.parametrize("licence", LICENCES, ids=lambda licence: licence.id)
def test_the_notice_file_that_is_offered_meets_the_duty_and_is_offered_once(licence: Licence) -> None:
    offered = notice_file(licence, {})
    if licence.notice is None:
        assert offered is None
        return
    assert offered is not None
    name, text = offered

    assert name == "Notice"
    assert licence.notice in text
    assert "a Notice file holds the sentence that the licence prescribes" not in _unmet(licence, documents={name: text})
    assert notice_file(licence, {name: text}) is None


def test_a_notice_of_the_bases_own_is_left_as_it_is() -> None:
    name, _ = notice_file(BY_ID["gemma"], {"NOTICE": "something else"}) or ("", "")

    assert name == "Notice.txt", "on some file systems Notice would replace NOTICE"


def test_only_licence_documents_are_read_and_not_without_end(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_bytes(b"\xff terms")
    (tmp_path / "Notice.txt").write_text("notice")
    (tmp_path / "USE_POLICY.md").write_text("x" * 3_000_000)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "LICENSES").mkdir()

    documents = licence_documents(tmp_path)

    assert sorted(documents) == ["LICENSE", "Notice.txt", "USE_POLICY.md"]
    assert documents["LICENSE"] == "\ufffd terms"
    assert len(documents["USE_POLICY.md"]) == 2**20


def test_every_record_is_fit_for_the_hubs_metadata() -> None:
    assert len(BY_ID) == len(LICENCES) >= 12
    for licence in LICENCES:
        assert re.fullmatch(r"[a-z0-9.-]+", licence.id)
        assert licence.text_holds
        assert all(value.isprintable() for value in licence.metadata.values())
        assert licence.link is None or licence.link.startswith("https://")
        assert licence.use_policy is None or licence.use_policy.startswith("https://")
