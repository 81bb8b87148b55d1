"""Words that tasks.py asks about."""

from __future__ import annotations

_NOUNS = """
apple box bus cat dog city baby leaf wolf knife tree house glass dish watch church fox lady story party key toy
boy hero potato chair table book pen bird horse river bag ball bank bed bell bench berry boat body bottle branch
brush butterfly button cake camera candle car card castle cherry class cloud coat country cup daisy day desk
door dress duck eagle ear egg eye family farm ferry field finger flag flower fork fly garden gift girl half hand
hat hill island jacket judge kiss lamp letter lion loaf lunch map match monkey month mountain mouth nurse ocean
orange peach pencil penny phone piano pony queen road rose school sandwich shelf ship shoe shop song spoon star
street tax thief tomato town train valley wife window wish year
"""
_PAST = """
walk:walked jump:jumped play:played stop:stopped try:tried go:went see:saw eat:ate run:ran write:wrote take:took
give:gave come:came make:made find:found carry:carried open:opened close:closed dance:danced plan:planned
help:helped cook:cooked work:worked talk:talked drink:drank sing:sang buy:bought think:thought bring:brought
teach:taught ask:asked answer:answered arrive:arrived bake:baked begin:began bite:bit blow:blew break:broke
build:built call:called catch:caught choose:chose clean:cleaned climb:climbed count:counted cry:cried draw:drew
dream:dreamed drive:drove drop:dropped fall:fell feed:fed feel:felt fight:fought fly:flew follow:followed
forget:forgot grow:grew hear:heard hide:hid hold:held hope:hoped hug:hugged hurry:hurried invite:invited
keep:kept kick:kicked know:knew laugh:laughed leave:left like:liked listen:listened live:lived look:looked
lose:lost love:loved marry:married meet:met miss:missed move:moved need:needed paint:painted pay:paid
pull:pulled push:pushed rain:rained reach:reached ride:rode ring:rang rise:rose sell:sold send:sent shake:shook
share:shared shout:shouted shop:shopped sit:sat sleep:slept smile:smiled speak:spoke stand:stood start:started
stay:stayed study:studied swim:swam tell:told thank:thanked throw:threw touch:touched travel:traveled
visit:visited wait:waited wake:woke want:wanted wash:washed watch:watched win:won
"""
NOUNS = _NOUNS.split()
PAST = dict(pair.split(":") for pair in _PAST.split())
"""verb -> its past tense"""
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Liam", "Mia",
         "Noah", "Olga", "Paul")
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Oslo", "Vienna", "Dublin", "Lisbon", "Prague")
JOBS = ("teacher", "baker", "nurse", "pilot", "farmer", "lawyer", "doctor", "painter", "singer", "driver")
