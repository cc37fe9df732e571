# The code at one commit with what it needs, in $code; done once. uv brings its own Python: images
# and login nodes often have one that is too old.
install() {
  if [ ! -e "$code/.installed" ]; then
    rm -rf "$code"
    git clone --quiet "$bundle" "$code"
    git -C "$code" checkout --quiet --detach "$commit"
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --python 3.12 "$code/.venv"
    python3 -m uv pip install --quiet --python "$code/.venv/bin/python" --editable "${code}[$extras]"
    touch "$code/.installed"
  fi
}
