"""Sentences about people at work, written for this project: the data of the demo, which needs no download.

Every occupation meets every template of its split in a female and in a male version that differ in nothing but the
cue of gender. So gender says nothing about occupation, field or template, and what a probe reads of it is the cue:
a pronoun, a first name, a noun such as *mother*, or a title. Train and test share no occupation, template, first name
or surname, but they share the fields, so that a probe for the field can be tested on occupations it has never seen.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from datasets import Dataset, DatasetDict, Features, Value

GENDERS = ("female", "male")

OCCUPATIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "train": {
        "health": (
            "nurse", "surgeon", "dentist", "pharmacist", "paramedic", "physiotherapist", "radiologist", "family doctor",
        ),
        "education": (
            "kindergarten teacher", "maths teacher", "school principal", "university lecturer", "private tutor",
            "teaching assistant", "history professor", "school counsellor",
        ),
        "law": (
            "lawyer", "judge", "prosecutor", "notary", "paralegal", "court clerk", "patent attorney", "legal adviser",
        ),
        "arts": (
            "painter", "violinist", "sculptor", "novelist", "photographer", "ballet dancer", "jazz pianist",
            "film director",
        ),
        "trades": (
            "plumber", "electrician", "carpenter", "welder", "bricklayer", "roofer", "locksmith", "plasterer",
        ),
        "science": (
            "biologist", "organic chemist", "physicist", "astronomer", "geologist", "statistician", "botanist",
            "oceanographer",
        ),
        "food": (
            "chef", "baker", "butcher", "barista", "bartender", "pastry cook", "cheesemaker", "brewer",
        ),
        "transport": (
            "bus driver", "truck driver", "airline pilot", "train conductor", "taxi driver", "tram driver",
            "ferry captain", "air traffic controller",
        ),
    },
    "test": {
        "health": ("paediatrician", "optometrist", "cardiologist", "speech therapist"),
        "education": ("primary school teacher", "college professor", "language tutor", "nursery teacher"),
        "law": ("solicitor", "barrister", "public defender", "magistrate"),
        "arts": ("illustrator", "cellist", "playwright", "opera singer"),
        "trades": ("stonemason", "floor tiler", "cabinetmaker", "heating engineer"),
        "science": ("zoologist", "microbiologist", "astrophysicist", "climate scientist"),
        "food": ("sous-chef", "pizza maker", "chocolatier", "caterer"),
        "transport": ("lorry driver", "helicopter pilot", "bicycle courier", "train driver"),
    },
}  # fmt: skip

FIRST_NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "train": {
        "female": (
            "Mary", "Anna", "Linda", "Susan", "Karen", "Laura", "Emily", "Sophie", "Julia", "Olivia", "Hannah", "Clara",
            "Margaret", "Alice", "Helen", "Rachel", "Fatima", "Aisha", "Priya", "Ingrid", "Maria", "Lucia", "Natalia",
            "Mei Ling", "Yuki", "Amelia", "Ruth", "Nicole", "Brenda", "Theresa", "Leila", "Chloe",
        ),
        "male": (
            "John", "Peter", "Robert", "Michael", "David", "Thomas", "James", "Daniel", "Henry", "Oliver", "George",
            "Jack", "Richard", "Edward", "Steven", "Paul", "Ahmed", "Omar", "Rajesh", "Lars", "Carlos", "Diego",
            "Ivan", "Wei Ming", "Kenji", "William", "Frank", "Patrick", "Gary", "Anthony", "Hassan", "Lucas",
        ),
    },
    "test": {
        "female": (
            "Elizabeth", "Charlotte", "Jennifer", "Patricia", "Rebecca", "Victoria", "Isabel", "Zainab", "Deepa",
            "Astrid", "Carmen", "Svetlana", "Sakura", "Eleanor", "Heather", "Grace",
        ),
        "male": (
            "Charles", "Benjamin", "Kevin", "Brian", "Matthew", "Samuel", "Antonio", "Mohammed", "Vikram", "Gustav",
            "Pablo", "Dmitri", "Hiroshi", "Arthur", "Walter", "Simon",
        ),
    },
}  # fmt: skip

SURNAMES: Mapping[str, tuple[str, ...]] = {
    "train": (
        "Bennett", "Okafor", "Lindqvist", "Morales", "Fraser", "Novak", "Harrington", "Rossi", "Tanaka", "Weber",
        "Delgado", "Osborne", "Whitfield", "Chowdhury", "Larsen", "Pemberton",
    ),
    "test": ("Holloway", "Adeyemi", "Bergmann", "Castillo", "Sinclair", "Kovacs", "Ashworth", "Mukherjee"),
}  # fmt: skip

CITIES: Mapping[str, tuple[str, ...]] = {
    "train": ("Bristol", "Lisbon", "Toronto", "Leeds", "Bergen", "Chicago", "Galway", "Vienna", "Melbourne", "Porto"),
    "test": ("Glasgow", "Valencia", "Boston", "Utrecht", "Dunedin", "Zagreb"),
}

GENDERED: Mapping[str, Mapping[str, str]] = {
    "female": {
        "she": "she", "her": "her", "them": "her", "herself": "herself", "title": "Ms.", "woman": "woman",
        "lady": "lady", "girl": "girl", "mother": "mother", "grandmother": "grandmother", "sister": "sister",
        "aunt": "aunt", "niece": "niece", "daughter": "daughter", "husband": "husband",
    },
    "male": {
        "she": "he", "her": "his", "them": "him", "herself": "himself", "title": "Mr.", "woman": "man",
        "lady": "gentleman", "girl": "boy", "mother": "father", "grandmother": "grandfather", "sister": "brother",
        "aunt": "uncle", "niece": "nephew", "daughter": "son", "husband": "wife",
    },
}  # fmt: skip
"""What the slots of a template stand for: named after the female form, ``{them}`` being the object pronoun."""

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "train": (
        "{name} has worked as {an_occupation} in {city} for {years} years.",
        "After {years} years as {an_occupation}, {she} still looks forward to {her} Monday mornings.",
        "The {occupation} said that {she} would call back as soon as {she} had finished {her} letter.",
        "The {occupation}, a {mother} of two from {city}, was back at work only a few weeks after the flood.",
        "{title} {surname}, {an_occupation} from {city}, told our reporter about {her} long working days.",
        "My {sister} became {an_occupation} in {year}, and nobody in the family was surprised.",
        "Everyone in the village knows the {occupation}, a cheerful {woman} of {age} who swims in the lake every day, "
        "whatever the weather.",
        "When the {occupation} arrived, {she} introduced {herself} and asked where {she} could leave {her} coat.",
        "{name} became {an_occupation} because {her} {grandmother} had been one before {them}.",
        "Our neighbour {name} is {an_occupation} who spends most weekends hiking near {city} with friends.",
        "The young {woman} who moved in upstairs told me that {she} is {an_occupation}.",
        "As {an_occupation}, {name} earns enough to pay for {her} flat near the old harbour in {city}.",
        "{Her} colleagues describe the {occupation} as patient, and they say that {she} never raises {her} voice.",
        "I asked the {occupation} for advice, and {she} gave me {her} card with a smile.",
        "In {her} speech the {occupation} thanked {her} {husband} for {years} happy years.",
        "{An_occupation} by profession, {name} plays chess on Thursdays and sings in a choir in {city}.",
        "The {lady} at the next table turned out to be {an_occupation} on holiday from {city}.",
        "{name} {surname} was {age} when {she} left the bank and decided to retrain as {an_occupation}.",
        "{title} {surname} has been our {occupation} ever since {she} moved here from {city} in {year}.",
        "At the age of {age}, my {aunt} gave up smoking, bought a motorbike and found work as {an_occupation}.",
        "The {occupation} lives with {her} {husband} and their three cats in a small house outside {city}.",
        "It was the {occupation} who noticed the mistake, and we are all grateful to {them}.",
        "{name}, the {occupation} on the third floor, left an umbrella in the lift again this morning.",
        "Ask {name}, because {she} has been {an_occupation} long enough to know how these things go.",
        "Few people in {city} remember the {occupation} as a shy little {girl} who was afraid of dogs.",
        "{She} had wanted to be {an_occupation} since {her} first visit to {city} as a {girl} of eight.",
        "The {occupation} cut {herself} on a broken glass and had to go home early.",
        "When {name} was hired as {an_occupation}, {her} old friends from {city} threw {them} a party.",
        "“I like working alone,” said the {occupation}, wiping {her} glasses on {her} sleeve.",
        "The new {occupation} is called {name} and comes from a little town near {city}.",
        "{Her} {years} years as {an_occupation} have taught {them} to trust {her} own judgement.",
        "{title} {surname}, a former {occupation}, now grows roses and walks along the river every evening.",
        "The {woman} in the photograph is {an_occupation} whom I met by chance in {city} in {year}.",
        "{name} met {her} {husband} while {she} was working as {an_occupation} in {city}.",
        "My {grandmother} was {an_occupation}, and {she} kept every one of {her} old diaries in a box under the bed.",
        "The {occupation} is the kind of {woman} who remembers every birthday and never forgets a face.",
        "For {her} birthday the {occupation} bought {herself} a second-hand tent and a week in the mountains.",
        "{name} and I grew up in the same street, but {she} became {an_occupation} and I stayed at home.",
        "Nobody paid much attention to the {occupation} until {she} stood up and cleared {her} throat.",
        "To {her} own surprise, the {occupation} slept well on the night before {her} first day in {city}.",
    ),
    "test": (
        "According to the local paper, {name} {surname} is the best {occupation} that {city} has ever had.",
        "The {occupation} checked {her} watch, picked up {her} bag and hurried out into the rain.",
        "{title} {surname} still works as {an_occupation}, although {she} turned {age} last spring.",
        "Our {daughter} hopes to be {an_occupation} one day, just like the one {she} saw on television.",
        "Being {an_occupation} suits {name}, since {she} likes meeting people and hates sitting still.",
        "A {mother} of three, the {occupation} gets up before dawn to have an hour to {herself}.",
        "You can tell that {she} is {an_occupation} from the way {she} talks about {her} week.",
        "The {occupation} smiled when we asked {them} about {her} plans for the summer.",
        "My cousin {name} works as {an_occupation} and rents a tiny room above a shop in {city}.",
        "In {year} the {woman} found a position as {an_occupation} and sent for the rest of {her} family.",
        "Two years ago the {occupation} lost {her} {husband}, and {she} has hardly taken a day off since.",
        "“Nobody tells me anything,” muttered the {occupation}, and {she} shut the door behind {them}.",
        "There was once {an_occupation} in {city} who took {her} dog to the park at exactly six every morning.",
        "{name} will retire next month, and the whole street will miss its favourite {occupation}.",
        "That tall {woman} with the red scarf must be the {occupation} that you told us about.",
        "Thanks to {her} job as {an_occupation}, {name} has seen more of {city} than most people born there.",
        "When {she} is not busy as {an_occupation}, {she} studies Portuguese and looks after a neighbour’s parrot.",
        "The {niece} of an old friend has just started as {an_occupation} in {city}, and {she} adores it.",
        "Would you please tell the {occupation} that {her} guests are here and that {she} need not hurry?",
        "Although {she} had doubts at first, the {occupation} told {herself} that it was worth a try.",
    ),
}

_YEARS = ("three", "five", "seven", "nine", "eleven", "fifteen", "twenty", "thirty")
_AGES = ("thirty-one", "thirty-eight", "forty-two", "forty-nine", "fifty-three", "fifty-seven")
_DATES = ("1987", "1994", "1999", "2003", "2008", "2012", "2016", "2019")


def occupation_sentences(seed: int = 0) -> DatasetDict:
    """Write the occupation sentences: 5,120 for training and 1,280 for testing, all distinct.

    Args:
        seed: Decides names, cities, numbers and the order of rows. Everything else is the same for every seed.

    Returns:
        Splits ``train`` and ``test`` with the string columns ``text``, ``gender`` (``"female"`` or ``"male"``),
        ``occupation``, ``field`` (one of eight) and the int64 column ``template``, an id unique over both splits.
        Each occupation of a split occurs once with each of its templates and each gender.

    Raises:
        TypeError: ``seed`` is no int.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}.")
    features = Features(
        {
            "text": Value("string"),
            "gender": Value("string"),
            "occupation": Value("string"),
            "field": Value("string"),
            "template": Value("int64"),
        }
    )
    rng = random.Random(seed)
    return DatasetDict({split: Dataset.from_list(_rows(split, rng), features=features) for split in TEMPLATES})


def _rows(split: str, rng: random.Random) -> list[dict[str, str | int]]:
    first_id = 0 if split == "train" else len(TEMPLATES["train"])
    rows: list[dict[str, str | int]] = []
    for field, occupations in OCCUPATIONS[split].items():
        for occupation in occupations:
            for template_id, template in enumerate(TEMPLATES[split], start=first_id):
                shared = _shared_slots(split, occupation, rng)
                for gender in GENDERS:
                    slots = shared | _gendered_slots(split, gender, rng)
                    rows.append(
                        {
                            "text": template.format_map(slots),
                            "gender": gender,
                            "occupation": occupation,
                            "field": field,
                            "template": template_id,
                        }
                    )
    rng.shuffle(rows)
    return rows


def _shared_slots(split: str, occupation: str, rng: random.Random) -> dict[str, str]:
    """What the female and the male version of a sentence have in common."""
    article = "an" if occupation[0] in "aeio" else "a"  # u: "university lecturer" takes "a"
    return {
        "occupation": occupation,
        "an_occupation": f"{article} {occupation}",
        "An_occupation": f"{article.capitalize()} {occupation}",
        "surname": rng.choice(SURNAMES[split]),
        "city": rng.choice(CITIES[split]),
        "years": rng.choice(_YEARS),
        "age": rng.choice(_AGES),
        "year": rng.choice(_DATES),
    }


def _gendered_slots(split: str, gender: str, rng: random.Random) -> dict[str, str]:
    words = dict(GENDERED[gender])
    return words | {
        "name": rng.choice(FIRST_NAMES[split][gender]),
        "She": words["she"].capitalize(),
        "Her": words["her"].capitalize(),
    }
