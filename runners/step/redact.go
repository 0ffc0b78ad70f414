package step

import (
	"encoding/base64"
	"encoding/json"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

const redacted = "[redacted]"

// minSecret is the shortest value that is taken out wherever it appears:
// anything shorter, such as mnist, occurs by chance in every other line.
const minSecret = 6

// shortNumber matches values of variables such as AUTH_TIMEOUT=600000: to take such
// a number out would make JSON invalid wherever it occurs by chance.
var shortNumber = regexp.MustCompile(`^[0-9]{1,8}$`)

// switches are values of variables such as TOKEN_AUTH=none: not secrets.
var switches = []string{"true", "false", "none", "null", "auto", "basic", "default"}

var (
	// secretName matches variables that hold a secret by a word of their name:
	// GITHUB_TOKEN and PGPASSWORD, not MAX_TOKENS or GIT_AUTHOR_NAME.
	secretName = regexp.MustCompile(`(?i)passw|(^|_)(passphrase|secret|token|credentials?|private_key|auth|authorization|api_?key|access_?key)(_|$)`)
	// keyName matches variables that may hold key material; Temper's own such
	// variables stand for flags, and those name files.
	keyName = regexp.MustCompile(`(?i)_key$`)
	// userPart matches the user and password of a URL, an @ in the password included.
	userPart = regexp.MustCompile(`([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s"'<>\\]*@`)
	// secretQuery matches query parameters that carry a secret.
	secretQuery = regexp.MustCompile(`(?i)([?&;](?:[\w.~%-]*(?:passw|secret|token|credential|signature|api_?key|auth|sig)[\w.~%-]*)=)[^&;#\s"'<>\\]+`)
	// authorization matches the header as HTTP clients print it.
	authorization = regexp.MustCompile(`(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}`)
)

// redactor takes secrets out of text.
type redactor struct{ values *strings.Replacer }

// secretsIn makes a redactor for the secret values of an environment in the
// form of os.Environ.
func secretsIn(environment []string) *redactor {
	var values []string
	for _, variable := range environment {
		name, value, _ := strings.Cut(variable, "=")
		secret := secretName.MatchString(name) || keyName.MatchString(name) && !strings.HasPrefix(name, "TEMPER_")
		if !secret || name == "SSH_AUTH_SOCK" { // a path, not a secret
			continue
		}
		for _, v := range append(strings.Split(value, "\n"), value) { // a log line may hold one line of a key
			if v = strings.TrimSpace(v); len(v) < minSecret || shortNumber.MatchString(v) || slices.Contains(switches, strings.ToLower(v)) {
				continue
			}
			values = append(values, v, base64.StdEncoding.EncodeToString([]byte(v)),
				url.QueryEscape(v), url.PathEscape(v), inJSON(v, true), inJSON(v, false))
		}
	}
	slices.SortFunc(values, func(a, b string) int { return len(b) - len(a) }) // the whole of a secret before its parts
	var pairs []string
	for _, v := range slices.Compact(values) {
		pairs = append(pairs, v, redacted)
	}
	return &redactor{strings.NewReplacer(pairs...)}
}

// inJSON is the text as it stands between the quotes of a JSON string.
func inJSON(text string, escapeHTML bool) string {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(escapeHTML)
	enc.Encode(text) // a string into memory cannot fail
	return strings.Trim(b.String(), "\n")[1 : b.Len()-2]
}

// Redact returns the text without secrets.
func (r *redactor) Redact(text string) string {
	return authorization.ReplaceAllString(RedactURLs(r.values.Replace(text)), "${1} "+redacted)
}

// RedactURLs returns the text without the secrets of its URLs: for what a step
// writes into an artifact, which must not depend on the environment.
func RedactURLs(text string) string {
	text = userPart.ReplaceAllString(text, "${1}"+redacted+"@")
	return secretQuery.ReplaceAllString(text, "${1}"+redacted)
}
