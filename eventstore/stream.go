package eventstore

import (
	"fmt"
	"hash/fnv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits of names, in bytes. They are the same on every backend, so that a
// domain can move between engines.
const (
	MaxCategoryBytes  = 64
	MaxStreamIDBytes  = 512
	MaxEventTypeBytes = 128
	MaxTagBytes       = 256
	MaxKeyBytes       = 256
)

// Slices is the number of slices that streams are spread over. It is part of
// the stored contract and never changes.
const Slices = 1024

// Stream names one stream of events: the category says what kind of thing it
// is about, the ID which one.
//
// A category is 1 to [MaxCategoryBytes] ASCII letters, digits, '.' and '_' and
// begins with a letter. An ID is 1 to [MaxStreamIDBytes] bytes of valid UTF-8
// without control characters; case matters. [Stream.Validate] checks both.
type Stream struct {
	Category string
	ID       string
}

// String returns the full name, category + "-" + ID. No two streams share a
// full name, since a category has no '-'.
func (s Stream) String() string { return s.Category + "-" + s.ID }

// IsZero reports whether s names no stream.
func (s Stream) IsZero() bool { return s == Stream{} }

// Slice returns the slice of the stream: FNV-1a 64 of its full name, modulo
// [Slices] (http://www.isthe.com/chongo/tech/comp/fnv/). Background work is
// divided among nodes by slice.
func (s Stream) Slice() uint16 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(s.Category))
	_, _ = h.Write([]byte{'-'})
	_, _ = h.Write([]byte(s.ID))
	return uint16(h.Sum64() % Slices)
}

// Validate returns an [ErrInvalid] or [ErrTooLarge] that quotes the name when
// it breaks the rules of [Stream].
func (s Stream) Validate() error {
	if err := ValidateCategory(s.Category); err != nil {
		return err
	}
	return validateText("stream id", s.ID, MaxStreamIDBytes)
}

// ParseStream is the inverse of [Stream.String].
func ParseStream(name string) (Stream, error) {
	category, id, found := strings.Cut(name, "-")
	if !found {
		return Stream{}, fmt.Errorf("%w: stream name %q has no '-' between category and id", ErrInvalid, clip(name))
	}
	s := Stream{Category: category, ID: id}
	return s, s.Validate()
}

// ValidateCategory checks a category alone.
func ValidateCategory(category string) error {
	switch {
	case category == "":
		return fmt.Errorf("%w: the category is empty: name the kind of stream, for example \"account\"", ErrInvalid)
	case len(category) > MaxCategoryBytes:
		return fmt.Errorf("%w: category %q has %d bytes, at most %d are allowed", ErrTooLarge, clip(category), len(category), MaxCategoryBytes)
	}
	for i, r := range category {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
		other := r >= '0' && r <= '9' || r == '.' || r == '_'
		if !letter && (i == 0 || !other) {
			return fmt.Errorf("%w: category %q: %q is not allowed at byte %d: use ASCII letters, digits, '.' and '_', beginning with a letter", ErrInvalid, clip(category), r, i)
		}
	}
	return nil
}

func validateText(what, text string, limit int) error {
	switch {
	case text == "":
		return fmt.Errorf("%w: the %s is empty", ErrInvalid, what)
	case len(text) > limit:
		return fmt.Errorf("%w: %s %q has %d bytes, at most %d are allowed", ErrTooLarge, what, clip(text), len(text), limit)
	case !utf8.ValidString(text):
		return fmt.Errorf("%w: %s %q is not valid UTF-8", ErrInvalid, what, clip(text))
	}
	for i, r := range text {
		if unicode.IsControl(r) {
			return fmt.Errorf("%w: %s %q has the control character %U at byte %d", ErrInvalid, what, clip(text), r, i)
		}
	}
	return nil
}

// clip keeps quoted input in error messages readable.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
