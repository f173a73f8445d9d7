"""Word lists of the generated tasks. A tokenizer uses those that it writes as one token with a leading space."""

from __future__ import annotations

FEMALE = [
    "Mary", "Anna", "Emma", "Sarah", "Laura", "Alice", "Julia", "Maria", "Lisa", "Susan", "Karen", "Helen", "Linda",
    "Nancy", "Rachel", "Emily", "Jessica", "Amy", "Kate", "Jane", "Rose", "Ruth", "Clara", "Diana", "Eva", "Grace",
    "Ellen", "Lucy", "Martha", "Sophie", "Elizabeth", "Margaret", "Barbara", "Jennifer", "Michelle", "Nicole",
    "Amanda", "Melissa", "Rebecca", "Catherine", "Caroline", "Charlotte", "Claire", "Christine", "Angela", "Andrea",
    "Hannah", "Olivia", "Sophia", "Lily", "Ella", "Molly", "Heather", "Megan", "Samantha", "Stephanie", "Vanessa",
    "Teresa", "Donna", "Carol", "Betty", "Dorothy", "Sandra", "Marie", "Anne", "Joan", "Judith", "Lauren", "Danielle",
    "Erin", "Allison", "Katherine", "Monica", "Natalie", "Naomi", "Sara", "Annie", "Elena", "Irene", "Isabel", "Nina",
    "Nora", "Paula", "Sally", "Sylvia", "Wendy",
]  # fmt: skip

MALE = [
    "John", "James", "Robert", "Michael", "David", "William", "Richard", "Thomas", "Charles", "Daniel", "Matthew",
    "Mark", "Paul", "Steven", "Andrew", "George", "Kevin", "Brian", "Edward", "Ronald", "Timothy", "Jason", "Jeffrey",
    "Ryan", "Jacob", "Gary", "Nicholas", "Eric", "Jonathan", "Stephen", "Larry", "Justin", "Scott", "Brandon",
    "Benjamin", "Samuel", "Gregory", "Frank", "Alexander", "Raymond", "Patrick", "Jack", "Dennis", "Jerry", "Aaron",
    "Adam", "Henry", "Nathan", "Peter", "Walter", "Kyle", "Harold", "Carl", "Jeremy", "Keith", "Roger", "Gerald",
    "Ethan", "Arthur", "Sean", "Lawrence", "Joe", "Noah", "Albert", "Bruce", "Dylan", "Alan", "Ralph", "Gabriel",
    "Roy", "Juan", "Wayne", "Eugene", "Logan", "Louis", "Russell", "Vincent", "Philip", "Bobby", "Johnny", "Simon",
    "Martin", "Luke", "Oliver", "Oscar", "Victor", "Leo", "Neil", "Fred", "Tom", "Tim", "Mike", "Steve", "Dave",
]  # fmt: skip

PLACES = [
    "store", "market", "school", "office", "park", "garden", "library", "museum", "hotel", "church", "farm", "station",
    "restaurant", "theater", "kitchen", "beach", "hospital", "factory", "gallery", "bakery", "harbor", "stadium",
    "studio", "castle", "cottage", "warehouse", "cafe", "gym", "mall", "zoo", "airport", "palace", "temple",
    "workshop",
]  # fmt: skip

OBJECTS = [
    "book", "letter", "map", "key", "ticket", "ring", "coat", "lamp", "phone", "camera", "basket", "bottle", "guitar",
    "painting", "clock", "knife", "hammer", "ball", "box", "bag", "watch", "hat", "umbrella", "notebook", "pencil",
    "mirror", "rope", "candle", "flag", "medal", "puzzle", "blanket", "bucket", "radio", "laptop", "sword", "wallet",
    "violin", "shirt", "drum",
]  # fmt: skip

EVENTS = [
    "war", "siege", "reign", "drought", "alliance", "voyage", "trial", "journey", "dispute", "festival", "project",
    "campaign", "famine", "plague", "rebellion", "revolt", "expedition", "study", "contract", "marriage",
    "partnership", "trade", "construction", "conflict", "strike", "occupation", "migration", "friendship", "mission",
    "crisis", "debate", "experiment", "game", "truce", "treaty", "search", "investigation", "building", "exhibition",
]  # fmt: skip

# (singular, plural)
THINGS = [
    ("key", "keys"), ("book", "books"), ("letter", "letters"), ("picture", "pictures"), ("car", "cars"),
    ("door", "doors"), ("window", "windows"), ("box", "boxes"), ("cup", "cups"), ("lamp", "lamps"),
    ("chair", "chairs"), ("tree", "trees"), ("flower", "flowers"), ("house", "houses"), ("bridge", "bridges"),
    ("ship", "ships"), ("boat", "boats"), ("train", "trains"), ("wall", "walls"), ("road", "roads"),
    ("ticket", "tickets"), ("map", "maps"), ("bag", "bags"), ("bottle", "bottles"), ("hat", "hats"),
    ("ring", "rings"), ("bell", "bells"), ("clock", "clocks"), ("wheel", "wheels"), ("engine", "engines"),
    ("camera", "cameras"), ("phone", "phones"), ("computer", "computers"), ("machine", "machines"),
    ("tool", "tools"), ("toy", "toys"), ("photo", "photos"), ("table", "tables"), ("knife", "knives"),
    ("shelf", "shelves"),
]  # fmt: skip

PEOPLE = [
    ("teacher", "teachers"), ("student", "students"), ("doctor", "doctors"), ("lawyer", "lawyers"),
    ("farmer", "farmers"), ("driver", "drivers"), ("writer", "writers"), ("artist", "artists"),
    ("singer", "singers"), ("actor", "actors"), ("player", "players"), ("worker", "workers"), ("guard", "guards"),
    ("nurse", "nurses"), ("boy", "boys"), ("girl", "girls"), ("friend", "friends"), ("neighbor", "neighbors"),
    ("child", "children"), ("man", "men"), ("woman", "women"), ("visitor", "visitors"), ("soldier", "soldiers"),
    ("officer", "officers"), ("manager", "managers"), ("scientist", "scientists"), ("author", "authors"),
    ("pilot", "pilots"),
]  # fmt: skip

# (singular, plural): closed-class and very frequent verbs in the present or past
VERBS = [
    ("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"), ("seems", "seem"), ("looks", "look"),
    ("comes", "come"), ("goes", "go"), ("makes", "make"), ("takes", "take"), ("needs", "need"), ("stands", "stand"),
]  # fmt: skip

ARGUMENTS = [
    "path", "name", "size", "color", "width", "height", "index", "value", "text", "data", "limit", "offset", "user",
    "token", "file", "line", "count", "image", "label", "depth", "mode", "speed", "weight", "price", "title", "date",
    "time", "password", "message", "port", "host", "state", "score", "model", "target", "source", "order", "group",
    "level", "angle", "code", "event", "item", "node", "page", "query", "scale", "url", "version", "region", "body",
    "filter", "format",
]  # fmt: skip

METHODS = [
    "load", "save", "open", "close", "read", "write", "send", "build", "update", "check", "find", "get", "set", "add",
    "remove", "create", "delete", "draw", "run", "start", "stop", "parse", "render", "move", "copy", "merge", "split",
]  # fmt: skip
