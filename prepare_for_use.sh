#!/bin/sh
# Makes the project ready for use: Python environment, packages, data. It never trains and may be run again at any time.
#
#   sh prepare_for_use.sh                            wikitext2; stdlib when the hub is out of reach
#   sh prepare_for_use.sh stdlib tinystories         these datasets
#   sh prepare_for_use.sh stdlib tokenizer=bytes     with key=value overrides, as train_model.py takes them
#
# An active virtual environment is used as it is; otherwise .venv is made in the project's folder.
# --help (-h) shows this text and does nothing else.
set -eu

say() { printf '== %s\n' "$*"; }

fail() {
    printf 'prepare_for_use.sh: %s\n' "$*" >&2
    exit 2
}

# The comment at the head of this file.
usage() {
    while IFS= read -r line; do
        case $line in
            '#!'*) ;;
            '#'*) line=${line#'#'} && printf '%s\n' "${line# }" ;;
            *) return ;;
        esac
    done <"$0"
}

for argument; do
    case $argument in
        -h | --help) usage && exit ;;
        -*) fail "$argument is no option here: name datasets and key=value overrides, or --help." ;;
    esac
done

# "3.12" for a python that starts, failure for one that does not (a dangling link, a version manager's empty shim).
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

is_supported() {
    case $1 in
        3.11 | 3.12 | 3.13) return 0 ;;
        *) return 1 ;;
    esac
}

# The folder of the active environment, or nothing. Conda's own base is shared by everything its user does: left alone.
active_environment() {
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        if [ -x "$VIRTUAL_ENV/bin/python" ]; then
            (CDPATH='' cd -- "$VIRTUAL_ENV" && pwd -P)
            return
        fi
        say "VIRTUAL_ENV names $VIRTUAL_ENV, which holds no Python: it is ignored" >&2
    elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
        printf '%s\n' "$CONDA_PREFIX"
        return
    fi
    for candidate in python python3; do # an environment whose bin folder leads the PATH, as in many containers
        "$candidate" -c 'import sys; sys.prefix != sys.base_prefix and print(sys.prefix)' 2>/dev/null || continue
        return
    done
}

# Sets base_python to the first python on the PATH that is supported and can make environments.
find_base_python() {
    unsupported='' without_venv=''
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        version=$(version_of "$candidate") || continue
        if ! is_supported "$version"; then
            unsupported="$unsupported, $candidate is $version"
        elif "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            base_python=$candidate
            return
        else
            without_venv=$version
        fi
    done
    [ -z "$without_venv" ] || fail "Python $without_venv lacks its venv module (Debian and Ubuntu: apt install" \
        "python3-venv or python$without_venv-venv): install it and run this again."
    fail "Python 3.11, 3.12 or 3.13 is needed and the PATH has none (${unsupported#, }${unsupported:+; }install one," \
        "or activate an environment that has one, and run this again)."
}

project=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
own_environment=$project/.venv

environment=$(active_environment)
if [ -n "$environment" ] && [ "$environment" != "$own_environment" ]; then
    version=$(version_of "$environment/bin/python") || fail "the Python of the active environment $environment does" \
        "not start: leave that environment (deactivate) and run this again."
    is_supported "$version" || fail "the active environment $environment has Python $version, and 3.11, 3.12 or 3.13" \
        "is needed: leave it (deactivate) or activate another one, and run this again."
else
    environment=$own_environment
    # venv writes the activate scripts last: without them it was interrupted.
    if [ -e "$environment/bin/activate" ] && version=$(version_of "$environment/bin/python"); then
        is_supported "$version" || fail "$environment has Python $version, and 3.11, 3.12 or 3.13 is needed: remove" \
            "that folder and run this again."
    else
        if [ -e "$environment" ] || [ -L "$environment" ]; then
            say "$environment is unfinished or broken: it is made anew"
            rm -rf "$environment"
        fi
        find_base_python
        say "Making the environment $environment with $base_python ($version)"
        "$base_python" -m venv "$environment"
    fi
fi
python=$environment/bin/python
say "Environment: $environment (Python $version)"

# -P: what lies in the current folder shadows no package. The file `unfinished` lists what is being installed for as
# long as that takes; finding it at the start means that an earlier set-up was cut off.
unfinished=$environment/prepare_for_use.unfinished
"$python" -P "$project/harness/entry/packages.py" "$unfinished"
if [ -e "$unfinished" ]; then
    "$python" -P -m pip --version >/dev/null 2>&1 || "$python" -P -m ensurepip || fail "$environment has no pip and" \
        "cannot get it by ensurepip: install pip there and run this again."
    say "Installing the packages: some minutes, and with CUDA's libraries some GB"
    "$python" -P -m pip install --no-input --disable-pip-version-check -r "$unfinished" || fail "pip could not install" \
        "the packages (its message stands above): put that right and run this again, it goes on from here."
    rm "$unfinished"
fi

"$python" "$project/scripts/prepare_data.py" "$@"
# What was prepared is what is trained on: the first dataset, and the overrides.
chosen='' dataset=''
for argument; do
    case $argument in
        *=*) chosen="$chosen $argument" ;;
        *) dataset=${dataset:- dataset=$argument} ;;
    esac
done
say "Ready. Next: python train_model.py attention=mla$dataset$chosen"
