package postgres

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgtype"
)

// This file holds the binary formats of PostgreSQL's protocol that the store
// writes and reads itself: rows of COPY (FORMAT binary), one-dimensional
// arrays, and integers. They are described in the PostgreSQL documentation
// ("COPY", binary format) and in the send and receive functions of each type.

// null is the length of a value that is NULL.
const null = -1

func appendInt16(b []byte, n int) []byte { return binary.BigEndian.AppendUint16(b, uint16(n)) }
func appendInt32(b []byte, n int) []byte { return binary.BigEndian.AppendUint32(b, uint32(n)) }
func appendInt64(b []byte, n int64) []byte {
	return binary.BigEndian.AppendUint64(b, uint64(n))
}

// Fields of a row: the length, then the value.
func fieldInt16(b []byte, n int) []byte   { return appendInt16(appendInt32(b, 2), n) }
func fieldInt32(b []byte, n int32) []byte { return appendInt32(appendInt32(b, 4), int(n)) }
func fieldInt64(b []byte, n int64) []byte { return appendInt64(appendInt32(b, 8), n) }
func fieldText(b []byte, s string) []byte { return append(appendInt32(b, len(s)), s...) }

// fieldBytes keeps nil apart from empty.
func fieldBytes(b, value []byte) []byte {
	if value == nil {
		return appendInt32(b, null)
	}
	return append(appendInt32(b, len(value)), value...)
}

// fieldTexts is a field of type text[]; NULL if there are none.
func fieldTexts(b []byte, all []string) []byte {
	if len(all) == 0 {
		return appendInt32(b, null)
	}
	size := arrayHeader
	for _, s := range all {
		size += 4 + len(s)
	}
	return appendTexts(appendInt32(b, size), all)
}

const arrayHeader = 20 // of an array of one dimension

// appendArray begins an array of n elements, whose fields must follow.
func appendArray(b []byte, element uint32, n int) []byte {
	if n == 0 {
		return appendInt32(appendInt32(appendInt32(b, 0), 0), int(element))
	}
	b = appendInt32(b, 1)            // dimensions
	b = appendInt32(b, 0)            // a hint that there are no NULLs, which the server does not rely on
	b = appendInt32(b, int(element)) // type
	b = appendInt32(b, n)
	return appendInt32(b, 1) // the first index
}

func appendTexts(b []byte, all []string) []byte {
	b = appendArray(b, pgtype.TextOID, len(all))
	for _, s := range all {
		b = fieldText(b, s)
	}
	return b
}

var errArray = errors.New("it is no array of texts: the database was damaged")

// decodeTexts reads an array of texts; nil for none.
func decodeTexts(b []byte) ([]string, error) {
	if len(b) == 0 {
		return nil, nil
	}
	if len(b) < 12 {
		return nil, errArray
	}
	switch binary.BigEndian.Uint32(b) {
	case 0:
		return nil, nil
	case 1:
	default:
		return nil, errArray
	}
	if len(b) < arrayHeader {
		return nil, errArray
	}
	n := binary.BigEndian.Uint32(b[12:])
	b = b[arrayHeader:]
	if uint64(n)*4 > uint64(len(b)) {
		return nil, errArray
	}
	all := make([]string, 0, n)
	for range n {
		if len(b) < 4 {
			return nil, errArray
		}
		size := int32(binary.BigEndian.Uint32(b))
		if b = b[4:]; size < 0 || int(size) > len(b) {
			return nil, errArray
		}
		all = append(all, string(b[:size]))
		b = b[size:]
	}
	if len(b) != 0 {
		return nil, errArray
	}
	return all, nil
}

// encodeArgument encodes an argument of a statement.
func encodeArgument(arg any) (value []byte, oid uint32) {
	switch v := arg.(type) {
	case int64:
		return appendInt64(nil, v), pgtype.Int8OID
	case string:
		return []byte(v), pgtype.TextOID
	case []int32:
		b := appendArray(nil, pgtype.Int4OID, len(v))
		for _, n := range v {
			b = fieldInt32(b, n)
		}
		return b, pgtype.Int4ArrayOID
	case []string:
		return appendTexts(nil, v), pgtype.TextArrayOID
	}
	panic(fmt.Sprintf("postgres: argument of type %T", arg))
}

// The header of COPY (FORMAT binary): signature, flags, length of an extension.
var copyHeader = []byte("PGCOPY\n\xff\r\n\x00\x00\x00\x00\x00\x00\x00\x00\x00")

// appendCopy appends the messages CopyData and CopyDone with all that fill
// writes into the first.
func appendCopy(b []byte, fill func([]byte) []byte) []byte {
	b = append(b, 'd')
	at := len(b)
	b = append(appendInt32(b, 0), copyHeader...)
	b = appendInt16(fill(b), -1) // the trailer
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at))
	return append(b, 'c', 0, 0, 0, 4)
}

// appendQuery appends the message Query.
func appendQuery(b []byte, text string) []byte {
	b = appendInt32(append(b, 'Q'), 4+len(text)+1)
	return append(append(b, text...), 0)
}

// appendExecute appends the messages Bind and Execute for a prepared statement,
// whose parameters are one value of eight bytes or none.
func appendExecute(b []byte, name string, parameters ...int64) []byte {
	b = append(b, 'B')
	at := len(b)
	b = append(appendInt32(b, 0), 0) // the unnamed portal
	b = append(append(b, name...), 0)
	b = appendInt16(appendInt16(b, 1), 1) // all parameters are binary
	b = appendInt16(b, len(parameters))
	for _, p := range parameters {
		b = fieldInt64(b, p)
	}
	b = appendInt16(appendInt16(b, 1), 1) // all results are binary
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at))
	b = append(appendInt32(append(b, 'E'), 4+1+4), 0)
	return appendInt32(b, 0) // all rows
}

// appendSync appends the message Sync, which ends a transaction that nobody began.
func appendSync(b []byte) []byte { return append(b, 'S', 0, 0, 0, 4) }

// The row of an event, as COPY wants it: ten fields, of which the first three
// have fixed places and are set once the commit has been judged.
const (
	rowFields  = 10
	atPosition = 2 + 4
	atVersion  = atPosition + 8 + 4
	atKind     = atVersion + 8 + 4
)

func setRow(row []byte, position, version uint64, kind int32) {
	binary.BigEndian.PutUint64(row[atPosition:], position)
	binary.BigEndian.PutUint64(row[atVersion:], version)
	binary.BigEndian.PutUint32(row[atKind:], uint32(kind))
}

// appendRow appends the row of an event, with room for what is set later.
func appendRow(b []byte, slice uint16, id uuid.UUID, nanoseconds int64, stream string, tags []string, metadata, data []byte) []byte {
	b = appendInt16(b, rowFields)
	b = fieldInt64(b, 0)
	b = fieldInt64(b, 0)
	b = fieldInt32(b, 0)
	b = fieldInt16(b, int(slice))
	b = append(appendInt32(b, len(id)), id[:]...)
	b = fieldInt64(b, nanoseconds)
	b = fieldText(b, stream)
	b = fieldTexts(b, tags)
	b = fieldBytes(b, metadata)
	return fieldBytes(b, data)
}

// rowField returns the field of a row with its length in front, which is also
// how an element of an array looks.
func rowField(row []byte, n int) []byte {
	at := 2
	for {
		size := max(0, int(int32(binary.BigEndian.Uint32(row[at:]))))
		if n == 0 {
			return row[at : at+4+size]
		}
		at += 4 + size
		n--
	}
}
