"""The benchmark's themes as datasets: classes, which drawings show them, and the splits."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlfast.data.dataset import Dataset, Split
from vlfast.data.glyphs.fonts import UNSEEN_FONTS, Glyph, human_words, load_masks, read_glyphs
from vlfast.data.glyphs.rendering import IMAGE_SIZE, NUM_UNIFORMS, render
from vlfast.errors import unknown_name

# A sorted set of words.
Concept = tuple[str, ...]

# Per theme: class names, and after "=" the other names that icon families have for them.
_CLASSES: dict[str, str] = {
    "nature": """
        sun; moon; cloud; star; rain = cloud rain, rainy, cloud showers heavy; snowflake = snow;
        lightning = bolt, zap, flash, lightning charge; wind = windy; tornado; rainbow; leaf;
        tree = tree deciduous; evergreen tree = tree evergreen, tree pine; flower = flower
        lotus; fire = flame; water drop = drop, droplet; waves = water; bug = bug beetle; bird;
        cat; dog; fish; paw = paw print; thermometer; fog = cloud fog, foggy, haze, mist; storm
        = cloud lightning, thunderstorms, cloud bolt, thunderstorm; snowy cloud = cloud snow,
        snowy; night cloud = cloud moon, moon cloudy; sunrise; sunset; earth = globe hemisphere
        east, globe hemisphere west, earth americas, earth europe, globe americas, globe asia
        australia, globe europe africa; planet; virus; egg; brain; lungs; ear; eye; hand = hand
        palm; footprints = shoe prints; clover; hurricane = typhoon, tropical storm; horse;
        baby; person; skull; mountain; plant = seedling, sprout; magnet; sparkle = sparkles,
        shining
    """,
    "places": """
        house = home; building; buildings = city, building; hospital; bank = landmark,
        university, building columns; factory = industry; shop = store, storefront; hotel;
        school; map = map trifold; map pin = geo, location dot, location pin, geo alt; globe;
        signpost = signs post; road; door = door closed; open door = door open; bed; airplane =
        plane; takeoff = airplane takeoff, plane takeoff, plane departure, flight takeoff;
        bicycle = bike; bus = bus front; car = car front; truck = truck front; train = train
        front, train regional; ship = boat, sailboat; rocket = rocket takeoff, rocket launch;
        gas station = gas pump, fuel pump, fuel; anchor; traffic light = traffic sign,
        stoplights, traffic light; traffic cone = cone, cone striped; compass; flag; suitcase =
        luggage, suitcase rolling; ticket; tent = campground; bridge; scooter = e bike,
        motorcycle; taxi = taxi front, car taxi front; fork and knife = fork knife, utensils,
        restaurant; coffee = cup hot, cup, mug hot, mug saucer; wine = wine glass, goblet;
        martini = martini glass; shopping cart = cart, cart shopping; shopping bag = bag, bag
        shopping; basket = shopping basket, basket shopping; toilet paper; shower = shower head;
        wheelchair; parking; cake = cake candles; pizza = pizza slice; cookie; life buoy =
        lifebuoy, life preserver, life ring; table; armchair = couch, sofa; hand bag = handbag;
        tram = train lightrail front, train tram, tram front; road sign = signpost split; stop
        sign = sign stop; ambulance = truck medical
    """,
    "devices": """
        laptop; phone = device mobile, mobile, smartphone, mobile screen; tablet = device
        tablet; desktop computer = desktop, pc display, computer; monitor = display; keyboard;
        mouse = computer mouse; printer = print; camera; video camera = camera video, video,
        vidicon; webcam; headphones = headphone; headset; speaker; microphone = mic; radio;
        television = tv; watch = smartwatch; game controller = controller, gamepad; joystick;
        battery = battery full; charging battery = battery charging; low battery = battery low,
        battery quarter; plug; wireless = wifi, wifi high; processor = cpu, microchip; memory
        card = sd card; memory = memory stick; hard drive = hdd, hard disk; server = hdd rack;
        database; router; projector = projector screen; robot = bot; calculator; alarm clock =
        alarm; telephone = phone; disc = vinyl, compact disc, record vinyl; sim card = sim, card
        sim; light bulb = lightbulb; lamp; fan; flashlight; floppy disk = floppy, save;
        fingerprint; film = film strip; broadcast = tower broadcast, radio tower; satellite;
        voicemail; power = power off, shut down; speedometer = gauge; presentation = easel,
        projector screen chart; terminal = terminal box; window = app window, browser; cassette
        = cassette tape; boombox = boom box; loudspeaker = volume up, speaker high, volume,
        volume high; muted = volume mute, speaker slash, volume x, volume xmark, speaker x;
        muted microphone = mic mute, microphone slash, mic off; screencast = cast, airplay; usb
        = usb drive; graphics card = gpu card, gpu; motherboard = circuit board; record player;
        phone call = telephone forward, phone volume; qr code = qrcode; barcode = upc
    """,
    "tools": """
        hammer; wrench; screwdriver = screwdriver wrench, tools; scissors; pencil; pen = pen
        line; fountain pen = pen nib, vector pen, pen tool, pen fancy; ruler = rulers; brush =
        paint brush, paintbrush; paint bucket = fill drip, paint; paint roller; eraser;
        highlighter = mark pen; key; lock; open lock = lock open, unlock, lock unlock;
        magnifying glass = search; gear = settings, cog; nut; funnel = filter; flask = flask
        conical; microscope; telescope; binoculars; stethoscope; syringe; pill = capsule, pills,
        capsules; bandage = bandaids, bandaid; first aid kit = first aid, kit medical, briefcase
        medical; thermometer; umbrella; trash = trash can, delete bin; bucket; broom = brush
        cleaning; shield; axe = axe, tools axe; shovel; bell; whistle; hourglass; stopwatch =
        timer; clock = time; magic wand = magic, wand magic, wand sparkles, wand; eyedropper =
        pipette, eye dropper, sip; sliders = faders, equalizer; palette; crop; puzzle piece =
        puzzle; megaphone = bullhorn; glasses = eyeglasses; ladder; knife; scales = scale
        balanced, scale, balance; balloon; dice = dice five, dice three; mask = face mask, mask
        face; barbell = dumbbell; crosshair = crosshairs, focus; target = bullseye; safe =
        vault; tooth; plus and minus = plus slash minus, plus minus; recycle; box = package,
        archive
    """,
    "office": """
        folder; open folder = folder open; file = file blank; files = file copy, copy;
        clipboard; envelope = mail; open envelope = envelope open, mail open; book; open book =
        book open; newspaper; notebook = journal, book; wallet; credit card = bank card; coin =
        coins; gift; trophy; medal = award; crown; tag = price tag; tags = price tags;
        briefcase; calendar; bookmark; bookmarks; paper clip = paperclip, attachment; push pin =
        pin, thumbtack, pushpin; backpack; graduation cap = mortarboard; pie chart = chart pie,
        chart pie slice; bar chart = chart bar, chart column, chart simple; line chart = graph
        up, chart line, line chart; image = picture; images = photo film; music note = music;
        musical notes = music notes, music note beamed; chat bubble = chat, comment, message,
        message circle; speech bubbles = chats, comments, chat dots; inbox = tray; paper plane =
        send, send plane, paper plane tilt; identification card = id card, identification badge,
        id badge; receipt = bill; money = cash, banknote, money bill; piggy bank = piggy bank;
        stamp = postage; mailbox; list; numbered list = list ordered, list ol, list numbers;
        quotes = quote, quote right, double quotes r; stack = layers, layer group; users =
        people, user group, team; user = user; diamond = gem; sticky note = sticky, note sticky,
        note; spell check = spellcheck; translate = language; link = link, links; share;
        download; upload; log in = sign in, login; log out = sign out, logout; table = table;
        pencil writing = pencil square, note pencil, edit, pen to square; handshake; thumbs up =
        hand thumbs up, thumb up; thumbs down = hand thumbs down, thumb down; smile = smiley,
        emoji smile, face smile, emotion happy; sad face = smiley sad, emoji frown, face frown,
        frown, emotion unhappy; grid = grid four, layout grid; phone book = address book,
        contacts book
    """,
    "shapes": """
        circle; square; triangle; hexagon; octagon; pentagon; rectangle; diamond = rhombus;
        heart; star; half star = star half; plus = add; minus = dash, subtract; x = close,
        xmark; check; up arrow = arrow up; down arrow = arrow down; left arrow = arrow left;
        right arrow = arrow right; up chevron = chevron up, caret up; down chevron = chevron
        down, caret down; left chevron = chevron left, caret left; right chevron = chevron
        right, caret right; infinity; asterisk; hash = hashtag; percent; at sign = at; question
        mark = question; exclamation mark = exclamation; play; pause; stop; record; eject; fast
        forward = forward, speed; rewind = backward; next = skip forward, skip end, forward
        step; previous = skip back, skip backward, skip start, backward step; shuffle; repeat;
        cube; spade = suit spade; club = suit club; slash; equals = equal; peace = peace; yin
        yang = yin yang; dollar sign = currency dollar, dollar, money dollar circle; euro sign =
        currency euro, currency eur, euro; pound sign = currency pound, currency gbp, sterling
        sign, pound sterling; male = gender male, mars, men; female = gender female, venus,
        women; information = info; warning = exclamation triangle, triangle exclamation,
        triangle alert, error warning, alert; prohibited = prohibit, ban, forbid; vertical dots
        = three dots vertical, dots three vertical, ellipsis vertical, more; horizontal dots =
        three dots, dots three, ellipsis; crossed arrows = arrows out, arrows move, move, arrows
        out cardinal; refresh = arrow clockwise, arrows clockwise, arrow repeat, refresh cw,
        rotate cw; cursor = cursor fill, mouse pointer, arrow pointer; brackets = braces,
        brackets curly, brackets square; code; list lines = menu, text left
    """,
}
THEMES: tuple[str, ...] = tuple(_CLASSES)
TEMPLATE = "an icon of a {}."

TRAINING_FAMILIES = ("phosphor", "bootstrap")
TEST_FAMILY = "lucide"
DOMAIN_FAMILIES = ("remix", "fontawesome")

# Words that only say what is drawn beside or around the thing: "cloud-check" still shows a cloud.
_ADDITIONS = frozenset(
    (
        *("check", "plus", "minus", "x", "add", "dash", "circle", "square", "box", "slash", "off"),
        *("dots", "dot", "text", "alert", "exclamation", "question"),
        *("heart", "gear", "cog", "lock", "star"),
    )
)
_DRAWINGS = 4
_IMAGES = {"train": 32, "val": 8, "test": 16, "domain": 12}
_CLASS_ORDER_SEED = 1


@dataclass(frozen=True)
class ThemeClass:
    """A class of a theme and its drawings: per split, lists of the glyphs of one drawing."""

    name: str
    drawings: dict[str, list[list[Glyph]]] = field(compare=False)


def _concept(words: Iterable[str]) -> Concept:
    return tuple(sorted(set(words)))


@lru_cache(maxsize=1)
def class_concepts() -> dict[str, dict[str, frozenset[Concept]]]:
    """Per theme and class name, the concepts (sorted word sets) that icon families have for it."""
    themes = {}
    for theme, text in _CLASSES.items():
        classes = {}
        for entry in " ".join(text.split()).split(";"):
            name, _, others = (part.strip() for part in entry.partition("="))
            aliases = [name, *(other.strip() for other in others.split(",") if other.strip())]
            classes[name] = frozenset(
                _concept(human_words(alias.replace(" ", "-"))) for alias in aliases
            )
        themes[theme] = classes
    return themes


@lru_cache(maxsize=1)
def _unseen_glyphs() -> tuple[dict[Concept, list[Glyph]], dict[Concept, list[Concept]]]:
    """The glyphs of each concept, and the concepts that come down to one without additions."""
    glyphs_of: dict[Concept, list[Glyph]] = defaultdict(list)
    for glyph in read_glyphs(UNSEEN_FONTS):
        glyphs_of[glyph.concept].append(glyph)
    extended: dict[Concept, list[Concept]] = defaultdict(list)
    for concept in glyphs_of:
        core = tuple(word for word in concept if word not in _ADDITIONS)
        if core != concept:
            extended[core].append(concept)
    return glyphs_of, extended


def _drawings_of(
    concepts: frozenset[Concept], taken: frozenset[Concept]
) -> dict[str, list[list[Glyph]]]:
    """Per family, the drawings of a class: exact names first, then those with an addition that
    are no class of their own (``taken``)."""
    glyphs_of, extended = _unseen_glyphs()
    with_additions = {c for core in concepts for c in extended.get(core, ())} - taken - concepts
    found: dict[str, dict[tuple[bool, str], list[Glyph]]] = defaultdict(lambda: defaultdict(list))
    for concept in concepts | with_additions:
        for glyph in glyphs_of.get(concept, ()):
            found[glyph.family][concept not in concepts, glyph.drawing].append(glyph)
    return {family: [same[key] for key in sorted(same)] for family, same in found.items()}


def _allocate(drawings: dict[str, list[list[Glyph]]], seed: str) -> dict[str, list[list[Glyph]]]:
    """Divide a class's drawings among the splits, none in two of them; empty lists where there
    are too few."""
    generator = random.Random(seed)
    remix, awesome = (list(drawings.get(family, [])) for family in DOMAIN_FAMILIES)
    test = list(drawings.get(TEST_FAMILY, []))
    train: list[list[Glyph]] = []
    spare: list[list[Glyph]] = []
    for family in TRAINING_FAMILIES:
        of_family = drawings.get(family, [])
        train += of_family[:1]
        spare += of_family[1:]
    generator.shuffle(spare)
    val: list[list[Glyph]] = []
    for drawing in spare:
        smallest = min((val, test, train), key=len)
        smallest.append(drawing)
    # Too few drawings in the training families: validate on one of another, of two if possible.
    others = [remix, awesome]
    generator.shuffle(others)
    for other, least in [(test, 2), *((o, 2) for o in others), *((o, 1) for o in others)]:
        if not val and len(other) >= least:
            val.append(other.pop())
    if not val and len(train) > 1:
        val.append(train.pop())
    return {
        "train": train[:_DRAWINGS],
        "val": val[:_DRAWINGS],
        "test": test[:_DRAWINGS],
        "remix": remix[:_DRAWINGS],
        "fontawesome": awesome[:_DRAWINGS],
    }


@lru_cache(maxsize=len(THEMES))
def theme_classes(theme: str) -> tuple[ThemeClass, ...]:
    """The classes of a theme that the installed fonts can show, in label order: a seeded shuffle,
    so that the first half (base) is no easier than the second. Raises UnknownNameError
    for an unknown theme, VlfastError if the fonts are not installed."""
    if theme not in THEMES:
        raise unknown_name("theme", theme, THEMES)
    concepts = class_concepts()[theme]
    classes = []
    for name in sorted(concepts):
        others = frozenset().union(*(c for n, c in concepts.items() if n != name))
        drawings = _allocate(_drawings_of(concepts[name] - others, others), f"{theme}/{name}")
        if drawings["train"] and drawings["val"] and drawings["test"]:
            classes.append(ThemeClass(name, drawings))
    random.Random(_CLASS_ORDER_SEED).shuffle(classes)
    return tuple(classes)


def seeded_uniforms(key: str, view: int | None) -> torch.Tensor:
    """The uniform numbers of one view of one image, float32 [NUM_UNIFORMS]: the same for the same
    key and view on every machine."""
    digest = hashlib.blake2b(f"{key}|{view}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.random(NUM_UNIFORMS, dtype=np.float32))


class GlyphImages:
    """Rendered glyphs by index (an ImageSource that renders batches). An image is a glyph and a
    number: several images of one glyph are different renderings of it."""

    renders_views = True
    image_size = IMAGE_SIZE

    def __init__(self, masks: np.ndarray, glyphs: Sequence[Glyph]) -> None:
        self._masks = torch.from_numpy(masks)
        self._glyphs = glyphs
        self._images: list[tuple[int, int]] = []

    def add(self, glyph: int, number: int) -> int:
        """The index of a new image: rendering ``number`` of a glyph, given by its row."""
        self._images.append((glyph, number))
        return len(self._images) - 1

    def __len__(self) -> int:
        return len(self._images)

    def glyph(self, index: int) -> Glyph:
        """The glyph that the image at ``index`` shows."""
        return self._glyphs[self._images[index][0]]

    def key(self, index: int) -> str:
        glyph, number = self._images[index]
        return f"{self._glyphs[glyph].key}#{number}"

    def load_batch(self, indices: Sequence[int], views: Sequence[int | None]) -> torch.Tensor:
        """The images at these indices, uint8 [B, 3, 48, 48]: what ``load`` gives for each, at a
        fraction of the time."""
        rows = torch.tensor([self._images[index][0] for index in indices])
        uniforms = torch.stack(
            [seeded_uniforms(self.key(i), view) for i, view in zip(indices, views, strict=True)]
        )
        return render(self._masks[rows], uniforms)

    def load(self, index: int, view: int | None = None) -> Image.Image:
        picture = self.load_batch([index], [view])[0]
        return Image.fromarray(picture.permute(1, 2, 0).numpy())


def _split(
    source: GlyphImages,
    classes: Sequence[ThemeClass],
    part: str,
    count: int,
    row_of: dict[Glyph, int],
) -> Split:
    indices, labels = [], []
    for label, theme_class in enumerate(classes):
        drawings = theme_class.drawings[part]
        if not drawings:
            continue
        for image in range(count):
            # Drawings take turns, and within a drawing its styles.
            round_, which = divmod(image, len(drawings))
            styles = drawings[which]
            number, style = divmod(round_, len(styles))
            indices.append(source.add(row_of[styles[style]], number))
            labels.append(label)
    return Split(source, np.array(indices, np.int64), np.array(labels, np.int64))


def load_theme(name: str, cache_dir: str | Path | None = None) -> Dataset:
    """A theme of icons as a dataset called "glyphs/NAME".

    train holds drawings of Phosphor and Bootstrap, test those of Lucide and others of the first
    two, the domains those of Remix and Font Awesome. No drawing is in two splits. Several images
    of a class may be renderings of one glyph. cache_dir: where masks are kept, by default
    $VLFAST_CACHE or ~/.cache/vlfast. Raises UnknownNameError for an unknown theme,
    VlfastError with the pip command if the fonts are not installed.
    """
    classes = theme_classes(name)
    glyphs = sorted(
        {
            glyph
            for theme_class in classes
            for drawings in theme_class.drawings.values()
            for drawing in drawings
            for glyph in drawing
        },
        key=lambda glyph: glyph.key,
    )
    source = GlyphImages(load_masks(glyphs, name, cache_dir), glyphs)
    row_of = {glyph: row for row, glyph in enumerate(glyphs)}

    def split(part: str, count: int) -> Split:
        return _split(source, classes, part, count, row_of)

    return Dataset(
        name=f"glyphs/{name}",
        classnames=tuple(theme_class.name for theme_class in classes),
        template=TEMPLATE,
        train=split("train", _IMAGES["train"]),
        val=split("val", _IMAGES["val"]),
        test=split("test", _IMAGES["test"]),
        domains={family: split(family, _IMAGES["domain"]) for family in DOMAIN_FAMILIES},
        context_init="an icon of a",
    )
