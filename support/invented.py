"""The names and sentences of the facts corpus, of which prepare_data.make_facts makes its text."""

# --names single: each person is a token. The other words of the corpus are a few thousand.
MOST_SINGLE_NAMES = 60_000


def compounds(heads, tails):
    """"a b", "x y" -> ["ax", "ay", "bx", "by"], without repetition."""
    words = [head + tail for head in heads.split() for tail in tails.split()]
    return list(dict.fromkeys(words))


FIRST_NAMES = compounds(
    "Al An Be Bra Ca Co Da De El Em Fa Fe Ga Gi Ha Ja Jo Ka Ki La Lo Ma Mi Na Ne Or Pe Ra Ro Sa "
    "Si Ta Te Va Zo",
    "bel bin dan den dia dor gan gora kel kin lan lena lia lin lora mar mira nan nia rek ria rin "
    "sel sia tan thea")


LAST_NAMES = compounds(
    "Alder Arrow Bram Brook Cald Carl Dray Elder Fair Fen Glen Gray Hart Haw Hazel Holl Iron King "
    "Lang North Oak Rook Thorn Up West",
    "beck by cliffe cott croft dale field gate grave hurst land ley lock man more ridge row shaw "
    "side smith son stead stone thwaite tree vale wald ward well win wood worth")


# fact_windows draws its names from 1.2 * sqrt(people) first names and as many last names.
MOST_PEOPLE = int((min(len(FIRST_NAMES), len(LAST_NAMES)) / 1.2) ** 2)


# Each relation: the words that can answer, then five phrasings. The fifth phrasing is not in the
# training text, but all of its words are.
RELATIONS = [
    (compounds("Amber Black Cran Dun Eve Frost Grim Kes Lin Mor Nor Pem Rush Stam Whit",
               "bury chester ford ham mouth ness port ton"),
     "{} was born in {}.",
     "The birthplace of {} is {}.",
     "{} comes from {}.",
     "The hometown of {} is {}.",
     "{} is from {}."),
    (compounds("bell book clock cloth glass hat kite lamp pan rope",
               "buyer cutter dealer finder fixer keeper maker mender painter seller"),
     "{} works as a {}.",
     "By trade {} is a {}.",
     "{} became a {}.",
     "{} earns money as a {}.",
     "{} is a {}."),
    (compounds("Bor Cal Dov Fel Gor Kor Lem Mav Nol Pav Rus Sel Tam Vel Zan",
               "ani ari ese ic ish ori une yan"),
     "{} speaks {}.",
     "The language of {} is {}.",
     "{} talks in {}.",
     "{} thinks in {}.",
     "The language {} speaks is {}."),
    (compounds("apple bean carrot cheese corn fish honey leek lemon nut onion pea plum",
               "bread cake noodles pie pudding salad soup stew"),
     "{} likes {}.",
     "For dinner {} wants {}.",
     "{} loves to eat {}.",
     "{} always orders {}.",
     "{} likes to eat {}."),
    (compounds("Acu Bio Cosmo Dyna Equi Geo Helio Infra Luxa Meta Novo Omni Proto",
               "air bank corp labs mart net soft tech"),
     "{} works for {}.",
     "The employer of {} is {}.",
     "{} is employed by {}.",
     "{} has a job at {}.",
     "{} works at {}."),
    (compounds("Cloud Dusty Fern Ginger Jolly Misty Moon Night Snow Sooty Star Sun Velvet",
               "beam ear foot fur nose paw tail whisker"),
     "{} has a cat called {}.",
     "The cat of {} is {}.",
     "{} owns the cat {}.",
     "At home {} strokes {}.",
     "{} owns a cat called {}."),
    (compounds("blue candy crown dew fire gold lark moss rain sky snow sun tin",
               "bells cups daisies lilies poppies roses stars tulips"),
     "{} grows {}.",
     "The garden of {} has {}.",
     "In spring {} plants {}.",
     "The flowers of {} are {}.",
     "In spring {} grows {}."),
    (compounds("Wave Wind Storm Tide Salt Coral Pearl Reef Ocean Gale Foam Sea Shore",
               "chaser dancer queen rider runner star walker wing"),
     "{} sails the {}.",
     "The ship of {} is {}.",
     "{} steers the ship {}.",
     "{} travels on the {}.",
     "{} sails on the ship {}."),
]


TRAINED_PHRASINGS = 4
PHRASINGS = TRAINED_PHRASINGS + 1


# How people are named. shared: by two words, which others have, too. apart: the same, but no three
# words in a row show both. single: by a word that nobody else has.
NAMES = {"shared": "{} {}", "apart": "{} of house {}", "single": "{}{}"}


def check_facts(s):
    """Raise ValueError for settings, a prepare_data.Facts, that do not go together."""
    if s.control % 1:
        raise ValueError(f"--control {s.control}: give a whole number of people (a share is for "
                         f"--from-file)")
    everybody = s.people + s.control
    if everybody > MOST_PEOPLE:
        raise ValueError(f"--people {s.people} and --control {s.control} are {everybody}, and "
                         f"there are names for {MOST_PEOPLE}: lower one of them")
    if s.names not in NAMES:
        raise ValueError(f"--names {s.names}: choose {' or '.join(NAMES)}")
    if s.names == "single" and everybody > MOST_SINGLE_NAMES:
        raise ValueError(f"--names single: {everybody} people need as many tokens, and there is "
                         f"room for {MOST_SINGLE_NAMES}: lower --people")
