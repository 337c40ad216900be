PRESIGNED_URL="${PRESIGNED_URL:-}"  # the link of Meta's e-mail, "https://download.llamameta.net/*?Policy=..."
MODEL_SIZE="${MODEL_SIZE-"7B,13B"}" # 30B,65B; llama-2-7b,Llama-3.2-1B,... (N_SHARD_DICT has all)
TARGET_FOLDER="${TARGET_FOLDER:-}"  # where all files should end up

# Downloads LLaMA's original weights from Meta: tokenizer, params.json, shards and lists of checksums.
#
#     PRESIGNED_URL="https://..." MODEL_SIZE="7B,13B" TARGET_FOLDER=/models/meta bash download_llama.sh
#
# The link comes by e-mail once Meta's licence is accepted (https://www.llama.com/llama-downloads). A file has its final
# name only when its checksum is right. What is there and right is not fetched again, and an interrupted run goes on
# where it stopped (unfinished files: .NAME.part). Needs bash 4, curl or GNU wget, md5sum or md5.
#
# Further settings: DOWNLOAD_TRIES (6: tries in a row without a new byte before giving up), DOWNLOAD_DELAY (2: seconds
# before the second try, doubled for each further one, at most 60), DOWNLOAD_TIMEOUT (60: seconds without a byte that
# end a try). Exit status: 2 for wrong settings, files that the server refuses or that are not what Meta's list says,
# and folders that cannot be written; 3 where the network fails.

# The settings come first, so there is no shebang: run this file with bash.
if [ -z "${BASH_VERSION:-}" ] || [ "${BASH_VERSINFO:-0}" -lt 4 ]; then
    echo "download_llama.sh: error: this needs bash 4 or newer: bash download_llama.sh (macOS: brew install bash)" >&2
    exit 2
fi
set -euo pipefail

declare -A N_SHARD_DICT=(["7B"]=0 ["13B"]=1 ["30B"]=3 ["65B"]=7) # the number of the last shard
for variant in "" "-chat"; do
    N_SHARD_DICT+=(["llama-2-7b$variant"]=0 ["llama-2-13b$variant"]=1 ["llama-2-70b$variant"]=7)
done
for variant in "" "-Instruct"; do
    for release in "Meta-Llama-3" "Meta-Llama-3.1" "Llama-3" "Llama-3.1"; do # the server has had both spellings
        N_SHARD_DICT+=(["$release-8B$variant"]=0 ["$release-70B$variant"]=7)
    done
    N_SHARD_DICT+=(["Llama-3.2-1B$variant"]=0 ["Llama-3.2-3B$variant"]=0)
done
for variant in "pre_trained" "instruction_tuned"; do # the first links to Llama 3
    N_SHARD_DICT+=(["8b_$variant"]=0 ["70b_$variant"]=7)
done

RUN_AGAIN="check the network, then run this again: it goes on where it stopped"

die() { # MESSAGE [STATUS]
    echo "download_llama.sh: error: $1" >&2
    exit "${2:-2}"
}

# run_child COMMAND...: runs it so that a signal to this script ends it at once; its exit status is left in STATUS.
run_child() {
    "$@" <&0 &
    CHILD=$!
    STATUS=0
    wait "$CHILD" || STATUS=$?
    CHILD=""
}

stop() { # STATUS: end on a signal; unfinished files stay, to be finished by the next run
    trap '' HUP INT TERM
    [ -z "$CHILD" ] || { kill "$CHILD" && wait "$CHILD"; } 2>/dev/null || true
    exit "$1"
}

# transfer FILE PART: one try to fetch what PART lacks of FILE. Leaves the client's exit status in STATUS and the
# server's in HTTP. The link goes in by a pipe, since the list of processes is public; --no-iri keeps its %7E as they
# are. Meta's server refuses programs that do not call themselves wget.
transfer() {
    local url="${PRESIGNED_URL%%\**}$1${PRESIGNED_URL#*\*}"
    : >"$HEADERS"
    if [ "$CLIENT" = curl ]; then
        run_child curl -q --config - --globoff --location --fail "$CURL_PROGRESS" --user-agent "Wget/1.21.4" \
            --connect-timeout "$DOWNLOAD_TIMEOUT" --speed-limit 1 --speed-time "$DOWNLOAD_TIMEOUT" \
            --continue-at - --output "$2" --dump-header "$HEADERS" < <(printf 'url = "%s"\n' "$url")
    else
        run_child wget --no-config --no-iri --input-file=- --quiet "$WGET_PROGRESS" --tries=1 \
            --timeout="$DOWNLOAD_TIMEOUT" --continue --output-document="$2" --server-response --output-file="$HEADERS" \
            < <(printf '%s\n' "$url")
    fi
    HTTP="$(awk '$1 ~ /^HTTP\// { status = $2 } END { print status + 0 }' "$HEADERS")"
}

size_of() { # FILE: its bytes; 0 where there is none
    if [ -f "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi
}

# fetch FOLDER NAME CHECK...: downloads NAME of FOLDER ("" or "7B/"); it gets its name once `CHECK... FILE` holds. Where
# the check fails, it is fetched again from its first byte, once: the part may have held bytes of another version.
fetch() {
    local file="$1$2" part="$TARGET_FOLDER/$1.$2.part" failures=0 again="" most size delay how
    shift 2
    [ ! -d "$TARGET_FOLDER/$file" ] || die "$TARGET_FOLDER/$file is a folder: move it away"
    most="$(size_of "$part")"
    echo "$file: fetching$([ "$most" -eq 0 ] || echo ", $most bytes are here already")"
    while true; do
        transfer "$file" "$part"
        case "$CLIENT $STATUS" in
            "curl 23" | "wget 3") die "$part cannot be written: no space left, or no right to write there" ;;
            "curl 33") rm -f -- "$part" && continue ;; # the server cannot send the rest alone
        esac
        if [ "$STATUS" -eq 0 ] || [ "$HTTP" -eq 416 ]; then # 416: no byte is missing
            REASON="is empty"
            [ ! -s "$part" ] || ! "$@" "$part" || break
            rm -f -- "$part"
            [ -z "$again" ] || die "$file: what the server sends $REASON: ask Meta for a new link, or try again later"
            again=1 most=0
            continue
        fi
        case "$HTTP" in
            408 | 425 | 429) ;;
            401 | 403) die "$file: HTTP $HTTP: the link has expired or does not cover this model: ask Meta for a new one" ;;
            4??) die "$file: HTTP $HTTP: the server does not have it: check PRESIGNED_URL and MODEL_SIZE" ;;
        esac
        size="$(size_of "$part")"
        if [ "$size" -gt "$most" ]; then most="$size" failures=0; fi
        failures=$((failures + 1))
        how="$CLIENT status $STATUS, HTTP $HTTP"
        [ "$failures" -lt "$DOWNLOAD_TRIES" ] ||
            die "$file: no answer or broken off, $failures times in a row ($how): $RUN_AGAIN" 3
        delay=$((DOWNLOAD_DELAY << (failures > 6 ? 6 : failures - 1)))
        delay=$((delay > 60 ? 60 : delay))
        echo "$file: broken off after $size bytes ($how), again in $delay s"
        run_child sleep "$delay"
    done
    { sync -- "$part" && mv -f -- "$part" "$TARGET_FOLDER/$file"; } || die "$TARGET_FOLDER/$file cannot be written"
    echo "$file: verified"
}

# listed_md5 CHECKLIST NAME: the checksum a list gives for a file. Lines are "md5  name" or "md5  ./name", perhaps CRLF.
listed_md5() {
    awk -v name="$2" '{ sub(/\r$/, ""); file = $2; sub(/^\*?(\.\/)?/, "", file) }
        file == name && length($1) == 32 && $1 !~ /[^0-9a-fA-F]/ { print tolower($1); exit }' "$1"
}

lists() { # NAME... CHECKLIST: whether the list has a checksum for each name
    local name
    for name in "${@:1:$#-1}"; do
        REASON="is no list of checksums that has $name"
        [ -n "$(listed_md5 "${!#}" "$name")" ] || return 1
    done
}

is_right() { # CHECKLIST NAME FILE: whether both files are there, and FILE has the checksum that the list gives for NAME
    local sum
    REASON="is not the file that Meta's list describes (another MD5, twice)"
    [ -f "$1" ] && [ -f "$3" ] && sum="$("${MD5[@]}" <"$3")" && [ "${sum%% *}" = "$(listed_md5 "$1" "$2")" ]
}

# fetch_folder FOLDER CHECKLIST NAME...: fetches the files that are not there and right, and the list of checksums first.
fetch_folder() {
    local folder="$TARGET_FOLDER/$1" list="$TARGET_FOLDER/$1$2" name wrong=""
    mkdir -p "$folder" 2>/dev/null || die "$folder cannot be made: choose another TARGET_FOLDER"
    for name in "${@:3}"; do
        is_right "$list" "$name" "$folder$name" || { wrong="$name" && break; }
    done
    if [ -z "$wrong" ]; then
        echo "${1:-"$TARGET_FOLDER/"}: verified already: ${*:3}"
        return
    fi
    rm -f -- "$folder.$2.part" # it may be the beginning of another version, which no checksum would tell
    fetch "$1" "$2" lists "${@:3}"
    for name in "${@:3}"; do
        if is_right "$list" "$name" "$folder$name"; then
            echo "$1$name: verified already"
        else
            fetch "$1" "$name" is_right "$list" "$name"
        fi
    done
}

case "${1:-}" in
    "") ;;
    -h | --help) sed -n '/^# Downloads/,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) die "'$1': settings are given in the environment, or in the first three lines (--help lists them)" ;;
esac
[ -n "$TARGET_FOLDER" ] || die 'TARGET_FOLDER is empty: name the folder where all files should end up'
[ "${TARGET_FOLDER#-}" = "$TARGET_FOLDER" ] || TARGET_FOLDER="./$TARGET_FOLDER" # or it would be taken for an option
# Mail programs break long links, and some copy them as HTML.
PRESIGNED_URL="$(printf '%s' "$PRESIGNED_URL" | tr -d '[:space:]' | sed 's/&amp;/\&/g')"
case "$PRESIGNED_URL" in
    "") die "PRESIGNED_URL is empty: give the link of Meta's e-mail (https://www.llama.com/llama-downloads)" ;;
    *[\"\\]*) die 'PRESIGNED_URL has a " or \ in it: copy the link of the e-mail again, between single quotes' ;;
    http://?*/* | https://?*/*) ;;
    *) die "PRESIGNED_URL must begin with https://: copy the link of Meta's e-mail again" ;;
esac
case "${PRESIGNED_URL%%\?*}" in
    *\**) ;;
    *) die "PRESIGNED_URL lacks the * that stands for the files' names: it ends in /*, or goes on with /*?Policy=..." ;;
esac
read -r -a SIZES <<<"${MODEL_SIZE//[,$'\n']/ }" || true
known="$(printf '%s\n' "${!N_SHARD_DICT[@]}" | sort | tr '\n' ' ')"
[ "${#SIZES[@]}" -gt 0 ] || die "MODEL_SIZE is empty: choose from $known"
for size in "${SIZES[@]}"; do
    [ -n "${N_SHARD_DICT["$size"]:-}" ] || die "MODEL_SIZE: there is no '$size': choose from $known"
done
for setting in DOWNLOAD_TRIES=6 DOWNLOAD_DELAY=2 DOWNLOAD_TIMEOUT=60; do
    name="${setting%=*}"
    printf -v "$name" '%s' "${!name:-${setting#*=}}"
    [[ "${!name}" =~ ^(0|[1-9][0-9]{0,5})$ ]] || die "$name='${!name}' is no whole number"
done

if command -v curl >/dev/null; then
    CLIENT=curl
elif wget --no-config --version >/dev/null 2>&1; then # not busybox's, which knows none of the options
    CLIENT=wget
else
    die "neither curl nor GNU wget is there: install one of them"
fi
CURL_PROGRESS=--silent WGET_PROGRESS=--no-verbose
[ ! -t 2 ] || CURL_PROGRESS=--progress-bar WGET_PROGRESS=--show-progress
if command -v md5sum >/dev/null; then MD5=(md5sum); else MD5=(md5 -r); fi
command -v "${MD5[0]}" >/dev/null || die "neither md5sum nor md5 is there: install GNU coreutils"

CHILD=""
HEADERS="$(mktemp)"
IS_NEW=""
[ -d "$TARGET_FOLDER" ] || IS_NEW=1
clean_up() { # a folder that this run made goes again if nothing came into it
    rm -f -- "$HEADERS"
    [ -z "$IS_NEW" ] ||
        find "$TARGET_FOLDER" -depth \( -name '.*.part' -size 0 -o -type d -empty \) -delete 2>/dev/null || true
}
trap clean_up EXIT
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
mkdir -p "$TARGET_FOLDER" 2>/dev/null || die "TARGET_FOLDER $TARGET_FOLDER cannot be made: choose another folder"
if command -v flock >/dev/null; then # macOS has none: there, two runs at once only spoil each other's unfinished files
    exec 9<"$TARGET_FOLDER"
    flock --nonblock --conflict-exit-code 9 9 2>/dev/null || [ $? -ne 9 ] ||
        die "another run fills $TARGET_FOLDER right now: wait for it"
fi

for size in "${SIZES[@]}"; do
    files=(params.json)
    case "$size" in
        *Llama-3* | 8b_* | 70b_*) files+=(tokenizer.model) ;;
        *) fetch_folder "" tokenizer_checklist.chk tokenizer.model ;;
    esac
    for ((shard = 0; shard <= N_SHARD_DICT["$size"]; shard++)); do
        files+=("$(printf 'consolidated.%02d.pth' "$shard")")
    done
    fetch_folder "$size/" checklist.chk "${files[@]}"
done

echo "verified: ${SIZES[*]} in $TARGET_FOLDER"
for size in "${SIZES[@]}"; do
    [[ "$size" =~ (^|-)([0-9]+)[bB] ]]
    billions="${BASH_REMATCH[2]}B" folder="$TARGET_FOLDER"
    [ "$size" = "$billions" ] || folder="${TARGET_FOLDER%/}/$size"
    printf 'next: python llama_download/convert_llama_weights_to_hf.py --input_dir %q' "$folder"
    printf ' --model_size %s --output_dir %q\n' "$billions" "${TARGET_FOLDER%/}/$size-hf"
done
