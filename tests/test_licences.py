"""What a licence asks for is known before anything is published, and every condition can be met."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
