package nats

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/deed-go/deed/eventstore"
)

// subjects maps streams to subjects, prefix.slice.category.id, so that no two
// streams share one:
//
//   - the prefix is the name of the log, which has no dot;
//   - the slice follows from the stream, and is a token so that a range of slices
//     can be asked for;
//   - in category and id every byte that means something in a subject, or is not
//     printable, is written as % and two capital hexadecimal digits, % included,
//     so that what is left has no dots and decoding gives the name again.
//
// Text that is not ASCII stays as it is: the server compares bytes.
type subjects struct{ prefix string }

// conditions is the subject of messages that carry a condition on a stream
// which their commit does not write. It has too few tokens to be a stream's.
func (s subjects) conditions() string { return s.prefix + ".conditions" }

// all matches everything in the log.
func (s subjects) all() string { return s.prefix + ".>" }

func (s subjects) of(stream eventstore.Stream) string {
	to := make([]byte, 0, len(s.prefix)+len(stream.Category)+len(stream.ID)+16)
	to = append(to, s.prefix...)
	to = append(to, '.')
	to = strconv.AppendUint(to, uint64(stream.Slice()), 10)
	to = append(to, '.')
	to = escape(to, stream.Category)
	to = append(to, '.')
	return string(escape(to, stream.ID))
}

// category matches the streams of one category.
func (s subjects) category(category string) string {
	return s.prefix + ".*." + string(escape(nil, category)) + ".*"
}

// slice matches the streams of one slice.
func (s subjects) slice(slice uint16) string {
	return s.prefix + "." + strconv.FormatUint(uint64(slice), 10) + ".*.*"
}

// stream is the inverse of of. It accepts nothing that of does not return.
func (s subjects) stream(subject string) (eventstore.Stream, error) {
	rest, found := strings.CutPrefix(subject, s.prefix+".")
	tokens := strings.Split(rest, ".")
	if !found || len(tokens) != 3 {
		return eventstore.Stream{}, fmt.Errorf("%w: subject %q is no stream's: it is not %s.<slice>.<category>.<id>", eventstore.ErrInvalid, subject, s.prefix)
	}
	var stream eventstore.Stream
	var err error
	if stream.Category, err = unescape(tokens[1]); err != nil {
		return eventstore.Stream{}, fmt.Errorf("%w: subject %q: %w", eventstore.ErrInvalid, subject, err)
	}
	if stream.ID, err = unescape(tokens[2]); err != nil {
		return eventstore.Stream{}, fmt.Errorf("%w: subject %q: %w", eventstore.ErrInvalid, subject, err)
	}
	if s.of(stream) != subject {
		return eventstore.Stream{}, fmt.Errorf("%w: subject %q is not how stream %q is written", eventstore.ErrInvalid, subject, stream)
	}
	return stream, nil
}

const digits = "0123456789ABCDEF"

func plain(c byte) bool {
	return c > ' ' && c != '.' && c != '*' && c != '>' && c != '%' && c != 0x7f
}

func escape(to []byte, text string) []byte {
	for i := range len(text) {
		if c := text[i]; plain(c) {
			to = append(to, c)
		} else {
			to = append(to, '%', digits[c>>4], digits[c&15])
		}
	}
	return to
}

func unescape(token string) (string, error) {
	if strings.IndexByte(token, '%') < 0 {
		return token, nil
	}
	to := make([]byte, 0, len(token))
	for i := 0; i < len(token); i++ {
		if token[i] != '%' {
			to = append(to, token[i])
			continue
		}
		if i+2 >= len(token) {
			return "", fmt.Errorf("%q ends within an escape", token)
		}
		high, low := strings.IndexByte(digits, token[i+1]), strings.IndexByte(digits, token[i+2])
		if high < 0 || low < 0 {
			return "", fmt.Errorf("%q has the escape %q", token, token[i:i+3])
		}
		to = append(to, byte(high<<4|low))
		i += 2
	}
	return string(to), nil
}
