"""Scripts that let bash, zsh and fish complete `ssl-pretrain`.

They call the hidden command `ssl-pretrain __complete WORD ...`, whose last word is the one to
complete.
"""

BASH = """\
_ssl_pretrain() {
    local line="${COMP_LINE:0:COMP_POINT}" words reply word
    IFS=' ' read -ra words <<< "$line"
    [[ $line == *' ' ]] && words+=('')
    word="${words[${#words[@]} - 1]}"
    IFS=$'\\n' read -rd '' -a reply < <("${words[0]}" __complete "${words[@]:1}" 2>/dev/null)
    # Readline replaces only the text after the last of these characters.
    COMPREPLY=("${reply[@]#"${word%"${word##*[=:]}"}"}")
    [[ ${#reply[@]} == 1 && ${reply[0]} == *[=./] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _ssl_pretrain ssl-pretrain
"""
ZSH = """\
#compdef ssl-pretrain
_ssl_pretrain() {
    local -a replies open closed
    replies=("${(@f)$("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    open=(${(M)replies:#*[=./]})
    closed=(${replies:#*[=./]})
    (( ${#open} )) && compadd -S '' -- $open
    (( ${#closed} )) && compadd -- $closed
    (( ${#open} + ${#closed} )) || _files
}
compdef _ssl_pretrain ssl-pretrain
"""
FISH = """\
function __ssl_pretrain_complete
    set -l words (commandline -opc) (commandline -ct)
    $words[1] __complete $words[2..-1] 2>/dev/null
end
complete -c ssl-pretrain -n __fish_use_subcommand -f
complete -c ssl-pretrain -a '(__ssl_pretrain_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
USAGE = """\
bash: add to ~/.bashrc                   eval "$(ssl-pretrain completion bash)"
zsh:  add to ~/.zshrc, after compinit    eval "$(ssl-pretrain completion zsh)"
fish: add to ~/.config/fish/config.fish  ssl-pretrain completion fish | source"""


def script(words: list[str]) -> str:
    """Return the completion script of a shell.

    Raises:
        ValueError: If the shell is not known.
    """
    if len(words) != 1 or words[0] not in SCRIPTS:
        raise ValueError(f"completion: give one of {', '.join(SCRIPTS)}\n{USAGE}")
    return SCRIPTS[words[0]].rstrip()
