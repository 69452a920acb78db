"""The catalog: names, their pictograms, and which of them are held out of training.

Pictograms are glyphs of the Noto Color Emoji font (SIL Open Font License 1.1); names are their Unicode CLDR short
names (Unicode License v3), made plainer where a person would say something else ("ladybug" for "lady beetle").
Flags, faces, people, clocks and look-alikes are left out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.errors import MissingPackage, OptionError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

__all__ = ["CATALOG", "PictogramObject", "Split", "pictogram", "split_catalog"]

FONT_PATHS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),  # Debian, Ubuntu
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),  # Arch
    Path("/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf"),  # Fedora
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),
    Path.home() / ".local/share/fonts/NotoColorEmoji.ttf",
)
GLYPH_SIZE = 109
"""The only size of the font's bitmaps (136 x 128 pixels)."""
HELD_OUT_SHARE = 0.17
SPLIT_SEED = 3
EXTRA = "extra"

_BY_CATEGORY = {
    "animal": (
        "🐒 monkey, 🦍 gorilla, 🐶 dog face, 🐕 dog, 🐺 wolf, 🦊 fox, 🐱 cat face, 🐈 cat, 🦁 lion, 🐯 tiger face, "
        "🐅 tiger, 🐆 leopard, 🐴 horse face, 🐎 horse, 🦄 unicorn, 🦓 zebra, 🦌 deer, 🐮 cow face, 🐷 pig face, "
        "🐐 goat, 🐪 camel, 🦒 giraffe, 🐘 elephant, 🦏 rhino, 🦛 hippo, 🐭 mouse face, 🐰 rabbit face, 🐿 "
        "chipmunk, 🦔 hedgehog, 🦇 bat, 🐻 bear, 🐨 koala, 🐼 panda, 🦘 kangaroo"
    ),
    "bird": (
        "🐓 rooster, 🐤 baby chick, 🐧 penguin, 🕊 dove, 🦅 eagle, 🦆 duck, 🦢 swan, 🦉 owl, 🦩 flamingo, 🦚 "
        "peacock, 🦜 parrot"
    ),
    "water": (
        "🐸 frog, 🐊 crocodile, 🐢 turtle, 🦎 lizard, 🐍 snake, 🦖 dinosaur, 🐋 whale, 🐬 dolphin, 🐟 fish, 🦈 "
        "shark, 🐙 octopus, 🐚 seashell, 🦀 crab"
    ),
    "bug": ("🐌 snail, 🦋 butterfly, 🐜 ant, 🐝 bee, 🐞 ladybug, 🕷 spider, 🦂 scorpion"),
    "plant": (
        "🌸 cherry blossom, 🌹 rose, 🌻 sunflower, 🌷 tulip, 🌱 seedling, 🌲 pine tree, 🌳 green tree, 🌴 palm "
        "tree, 🌵 cactus, 🍀 clover leaf, 🍁 maple leaf, 🍄 mushroom"
    ),
    "fruit": (
        "🍇 grapes, 🍉 watermelon, 🍋 lemon, 🍌 banana, 🍍 pineapple, 🥭 mango, 🍎 red apple, 🍏 green apple, 🍐 "
        "pear, 🍑 peach, 🍒 cherries, 🍓 strawberry, 🥝 kiwi, 🍅 tomato, 🥥 coconut"
    ),
    "vegetable": (
        "🥑 avocado, 🍆 eggplant, 🥔 potato, 🥕 carrot, 🌽 corn, 🌶 red pepper, 🥒 cucumber, 🥦 broccoli, 🧄 "
        "garlic, 🧅 onion"
    ),
    "food": (
        "🥐 croissant, 🥖 baguette, 🥨 pretzel, 🥞 pancakes, 🧀 cheese, 🍗 chicken leg, 🥓 bacon, 🍔 hamburger, "
        "🍟 french fries, 🍕 pizza, 🌭 hot dog, 🥪 sandwich, 🌮 taco, 🥚 egg, 🥗 salad, 🍿 popcorn, 🍝 spaghetti, "
        "🍣 sushi"
    ),
    "sweet": (
        "🍨 ice cream, 🍩 donut, 🍪 cookie, 🎂 birthday cake, 🧁 cupcake, 🥧 pie, 🍫 chocolate bar, 🍬 candy, 🍭 "
        "lollipop"
    ),
    "drink": ("🍼 baby bottle, ☕ coffee cup, 🍷 wine glass, 🍺 beer, 🥤 soda cup"),
    "dish": ("🥄 spoon, 🔪 kitchen knife, 🍽 plate with fork and knife"),
    "building": ("🏠 house, 🏰 castle, ⛪ church, ⛺ tent, 🎡 ferris wheel, 🎪 circus tent"),
    "vehicle": (
        "🚂 steam train, 🚌 bus, 🚑 ambulance, 🚒 fire truck, 🚓 police car, 🚕 taxi, 🚗 red car, 🚚 truck, 🚜 "
        "tractor, 🏍 motorcycle, 🚲 bicycle, ⛵ sailboat, 🚢 ship, ✈ airplane, 🚁 helicopter, 🚀 rocket, 🛸 "
        "flying saucer, 🎈 balloon"
    ),
    "weather": (
        "🌙 crescent moon, ☀ sun, ⭐ star, ☁ cloud, ❄ snowflake, ⛄ snowman, 🔥 fire, 💧 water drop, 🌈 "
        "rainbow, ☂ umbrella"
    ),
    "sport": (
        "🎃 halloween pumpkin, 🎄 christmas tree, 🎁 gift box, 🏆 trophy, 🥇 gold medal, ⚽ soccer ball, ⚾ "
        "baseball, 🏀 basketball, 🏈 american football, 🎾 tennis racket, 🥊 boxing glove, ⛸ ice skate, 🎯 "
        "target, 🪁 kite"
    ),
    "toy": ("🎮 game controller, 🎲 dice, 🧩 puzzle piece, 🧸 teddy bear, 🎨 artist palette, 🧶 yarn"),
    "clothes": (
        "👓 glasses, 🕶 sunglasses, 👔 necktie, 👕 t-shirt, 👖 jeans, 🧤 gloves, 🧦 socks, 👗 dress, 👜 handbag, "
        "🎒 backpack, 👟 sneaker, 👠 red high heel shoe, 👑 crown, 🎩 top hat, 🎓 graduation cap, 💄 lipstick, "
        "💍 ring, 💎 diamond"
    ),
    "music": (
        "🔔 bell, 🎤 microphone, 🎧 headphones, 📻 radio, 🎷 saxophone, 🎸 guitar, 🎺 trumpet, 🎻 violin, 🥁 drum"
    ),
    "device": (
        "📱 phone, ☎ telephone, 💻 laptop, ⌨ keyboard, 📷 camera, 📺 television, 🔍 magnifying glass, 💡 light "
        "bulb, 🔦 flashlight, ⌚ watch, ⏰ alarm clock, ⏳ hourglass, 🧭 compass"
    ),
    "office": (
        "📕 red book, 📗 green book, 📘 blue book, 📙 orange book, 📰 newspaper, ✉ envelope, 📦 package, ✏ "
        "pencil, 💼 briefcase, 📎 paperclip, ✂ scissors, 🔑 key"
    ),
    "tool": (
        "🔨 hammer, 🪓 axe, 🔧 wrench, ⚙ gear, 🧲 magnet, 🔬 microscope, 🛡 shield, 🏹 bow and arrow, 💣 bomb, 🪜 "
        "ladder, 🪃 boomerang"
    ),
    "house": ("🚪 door, 🛏 bed, 🪑 chair, 🚽 toilet, 🛁 bathtub, 🧹 broom, 🛒 shopping cart, 🪟 window"),
    "heart": (
        "❤ red heart, 🧡 orange heart, 💛 yellow heart, 💚 green heart, 💙 blue heart, 💜 purple heart, 🖤 black heart"
    ),
    "circle": ("🔴 red circle, 🟠 orange circle, 🟡 yellow circle, 🟢 green circle, 🔵 blue circle, 🟣 purple circle"),
    "square": ("🟥 red square, 🟧 orange square, 🟨 yellow square, 🟩 green square, 🟦 blue square, 🟪 purple square"),
    "figure": ("🤖 robot, 👻 ghost, 👽 alien, 💀 skull, 🤡 clown"),
    "sign": ("🛑 stop sign, 🚦 traffic light, ⚓ anchor, ⛽ gas pump"),
}

# Look-alikes and things hard to name, for training only: the more names it has met, the more an unmet one tells it.
_TRAINING_ONLY = (
    "🐵 monkey face, 🐩 poodle, 🐂 ox, 🐃 buffalo, 🐄 cow, 🐖 pig, 🐗 boar, 🐏 ram, 🐑 ewe, 🦙 llama, 🐁 "
    "mouse, 🐀 rat, 🐹 hamster, 🐇 rabbit, 🦥 sloth, 🦦 otter, 🦨 skunk, 🦃 turkey, 🐔 chicken, 🐣 "
    "hatching chick, 🐉 dragon, 🦕 sauropod, 🐳 spouting whale, 🐠 tropical fish, 🐡 blowfish, 🦞 "
    "lobster, 🦐 shrimp, 🦑 squid, 🦗 cricket, 💐 bouquet, 🌺 pink flower, 🌼 yellow flower, 🌾 rice "
    "plant, 🍂 brown leaf, 🍈 melon, 🍊 tangerine, 🥬 lettuce, 🥜 peanuts, 🌰 chestnut, 🍞 bread, 🧇 "
    "waffle, 🍖 meat on bone, 🍳 fried egg, 🍲 stew, 🍙 rice ball, 🍚 bowl of rice, 🍜 noodle soup, 🍤 "
    "fried shrimp, 🍡 dango, 🥟 dumpling, 🍦 ice cream cone, 🍰 shortcake, 🍮 pudding, 🍯 honey pot, "
    "🥛 glass of milk, 🍵 cup of tea, 🍸 cocktail glass, 🍹 tropical drink, 🧊 ice cube, 🍴 fork and "
    "knife, 🏺 amphora, 🏛 temple, 🏢 office building, 🏥 hospital, 🏦 bank, 🏫 school, 🏭 factory, 🕌 "
    "mosque, 🎠 carousel, 🗿 stone statue, 🗽 statue of liberty, 🚋 tram, 🚙 blue car, 🏎 racing car, "
    "🛵 motor scooter, 🛴 kick scooter, 🚤 speedboat, 🪂 parachute, ⚡ lightning, 🌊 wave, 🥎 "
    "softball, 🏐 volleyball, 🥏 frisbee, 🎳 bowling, 🏒 hockey stick, 🏓 table tennis paddle, 🏸 "
    "badminton racket, 🎣 fishing rod, 🎱 billiard ball, 🪅 pinata, 🎭 theater masks, 🧵 thread, 🥽 "
    "goggles, 🧣 scarf, 🧥 coat, 👘 kimono, 👙 bikini, 👛 purse, 👞 brown shoe, 🥾 hiking boot, 👢 "
    "boot, 👒 straw hat, 📯 horn, 🎹 piano, 🪕 banjo, 🔋 battery, 🔌 electric plug, 🖨 printer, 💿 "
    "compact disc, 📹 camcorder, 🏮 paper lantern, 🎥 movie camera, 📔 notebook, 📜 scroll, 💰 money "
    "bag, 📫 mailbox, ✒ pen, 🖍 crayon, 📁 file folder, 📅 calendar, 📌 pushpin, 📏 ruler, 📐 "
    "triangular ruler, 🔒 padlock, ⛏ pickaxe, 🔩 screw, 🧪 test tube, 🔭 telescope, 🧰 toolbox, 🗡 "
    "dagger, 🪚 saw, 🛋 couch, 🚿 shower, 🪒 razor, 🧺 basket, 🧻 toilet paper, 🧼 soap, 🗑 trash can, "
    "🪞 mirror, 🖼 painting, 🤎 brown heart, 🤍 white heart, 🟤 brown circle, ⚫ black circle, 🟫 "
    "brown square, ⬛ black square, 👹 ogre, 👾 space invader, 💩 poo, 🚧 barrier"
)


@dataclass(frozen=True)
class PictogramObject:
    """One kind of object."""

    name: str
    glyph: str
    category: str


@dataclass(frozen=True)
class Split:
    """Names in catalog order."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    """Never seen in training: neither the pictogram nor, as a class, the name."""
    extra: tuple[str, ...]
    """Seen in training, not asked for in the evaluation: look-alikes of other objects."""


def _parse() -> dict[str, PictogramObject]:
    found = {}
    for category, text in {**_BY_CATEGORY, EXTRA: _TRAINING_ONLY}.items():
        for entry in text.split(", "):
            glyph, name = entry.split(" ", 1)
            found[name] = PictogramObject(name, glyph, category)
    return found


CATALOG: dict[str, PictogramObject] = _parse()
"""Every object by its name."""


@cache
def split_catalog(seed: int = SPLIT_SEED) -> Split:
    """Hold out the same share of every category, so an unseen name has seen relatives."""
    rng = random.Random(seed)
    held: set[str] = set()
    for category in _BY_CATEGORY:
        names = [thing.name for thing in CATALOG.values() if thing.category == category]
        held.update(rng.sample(names, max(1, round(HELD_OUT_SHARE * len(names)))))
    return Split(
        trained=tuple(name for name, thing in CATALOG.items() if thing.category != EXTRA and name not in held),
        held_out=tuple(name for name in CATALOG if name in held),
        extra=tuple(name for name, thing in CATALOG.items() if thing.category == EXTRA),
    )


@cache
def _font() -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    path = next((path for path in FONT_PATHS if path.is_file()), None)
    if path is None:
        raise MissingPackage(
            "the Noto Color Emoji font is not installed; apt-get install fonts-noto-color-emoji, "
            "or copy NotoColorEmoji.ttf to ~/.local/share/fonts"
        )
    try:
        return ImageFont.truetype(str(path), GLYPH_SIZE)
    except OSError as error:
        raise MissingPackage(
            f"font {path} has no {GLYPH_SIZE}-pixel bitmaps ({error}); apt-get install fonts-noto-color-emoji "
            "gives the edition that has them"
        ) from None


@cache
def pictogram(name: str) -> Image.Image:
    """Return the RGBA picture of an object, cropped to what is not transparent (about 128 pixels wide).

    Raises:
        OptionError: no such object.
        MissingPackage: the font is missing or of another kind.
    """
    from PIL import Image, ImageDraw

    if name not in CATALOG:
        raise OptionError(f"no object is called {name!r}; the names are in examples/nano/objects.py")
    canvas = Image.new("RGBA", (2 * GLYPH_SIZE, 2 * GLYPH_SIZE))
    ImageDraw.Draw(canvas).text((20, 20), CATALOG[name].glyph, font=_font(), embedded_color=True)
    # Half transparent pixels and fainter are the edge's blur, no part of the object.
    box = canvas.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    if box is None:
        raise MissingPackage(
            f"the font has no glyph for {name!r}; apt-get install fonts-noto-color-emoji for a newer edition"
        )
    return canvas.crop(box)
