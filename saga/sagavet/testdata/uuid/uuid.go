// Package uuid has the signatures of the real one.
package uuid

type UUID [16]byte

func New() UUID { return UUID{} }

func NewString() string { return "" }

func Must(id UUID, err error) UUID { return id }

func NewV7() (UUID, error) { return UUID{}, nil }

func NewSHA1(space UUID, data []byte) UUID { return space }

func MustParse(s string) UUID { return UUID{} }
