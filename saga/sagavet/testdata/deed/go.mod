module github.com/deed-go/deed

go 1.26
